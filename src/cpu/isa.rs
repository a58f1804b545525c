//! Which instruction set runs: found once at run time, or forced by `LLAMA1M_ISA` (for tests and bug hunts).

use std::sync::OnceLock;

use super::arch::{Kernels, portable};
use crate::error::{Error, Result};

/// The environment variable that forces a level.
pub const VARIABLE: &str = "LLAMA1M_ISA";

/// One instruction-set level.
#[derive(Clone, Copy)]
pub struct Isa {
    /// The level's name in `LLAMA1M_ISA`.
    pub name: &'static str,
    /// Its kernels.
    pub kernels: Kernels,
    available: fn() -> bool,
}

/// Every level this build knows, best first.
const LEVELS: &[Isa] = &[
    #[cfg(target_arch = "x86_64")]
    Isa { name: "avx512fma", kernels: super::arch::avx512::AVX512_FMA, available: || avx512bf16() && intel() },
    #[cfg(target_arch = "x86_64")]
    Isa { name: "avx512bf16", kernels: super::arch::avx512::AVX512_BF16, available: avx512bf16 },
    #[cfg(target_arch = "x86_64")]
    Isa { name: "avx512", kernels: super::arch::avx512::AVX512, available: avx512 },
    #[cfg(target_arch = "x86_64")]
    Isa { name: "avx2", kernels: super::arch::avx2::AVX2, available: avx2 },
    #[cfg(target_arch = "aarch64")]
    Isa {
        name: "neon",
        kernels: super::arch::neon::NEON,
        available: || std::arch::is_aarch64_feature_detected!("neon"),
    },
    Isa { name: "portable", kernels: portable::PORTABLE, available: || true },
];

#[cfg(target_arch = "x86_64")]
fn avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

#[cfg(target_arch = "x86_64")]
fn avx512() -> bool {
    avx2()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

#[cfg(target_arch = "x86_64")]
fn avx512bf16() -> bool {
    // Every CPU with the one has the other.
    avx512() && is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512vnni")
}

/// Whether Intel made this CPU.
#[cfg(target_arch = "x86_64")]
fn intel() -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    [id.ebx, id.edx, id.ecx].map(u32::to_le_bytes).concat() == *b"GenuineIntel"
}

/// The levels this CPU has, best first.
pub fn available() -> impl Iterator<Item = &'static Isa> {
    LEVELS.iter().filter(|l| (l.available)())
}

/// The level in use: the one that `LLAMA1M_ISA` names, else the best.
///
/// # Errors
/// When the variable names a level that is unknown or that this CPU lacks.
pub fn active() -> Result<&'static Isa> {
    static CHOICE: OnceLock<Result<&'static Isa>> = OnceLock::new();
    CHOICE.get_or_init(|| choose(std::env::var(VARIABLE).ok().as_deref())).clone()
}

fn choose(wish: Option<&str>) -> Result<&'static Isa> {
    match wish {
        None | Some("") => Ok(available().next().expect("portable is always there")),
        Some(name) => available().find(|l| l.name == name).ok_or_else(|| {
            let names: Vec<_> = available().map(|l| l.name).collect();
            Error::value(VARIABLE, format!("one of this CPU's levels, {}", names.join(", ")), name)
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_chosen_by_name() {
        assert_eq!(choose(Some("portable")).map(|l| l.name).ok(), Some("portable"));
        assert!(choose(None).is_ok());
        let e = choose(Some("sse9")).err().expect("unknown").to_string();
        assert!(e.contains("LLAMA1M_ISA") && e.contains("portable") && e.contains("sse9"), "{e}");
    }
}
