//! Where a kernel's machine code comes from: the wheel, where it carries the GPU's architecture; else the disk cache;
//! else the NVRTC that torch brought, whose result goes there.
//!
//! Everything is found by content (source, headers, options, architecture, NVRTC), never by path or time. A file is written
//! beside its place and renamed, so that any number of processes may do so at once, and has its checksum as its
//! last 8 bytes: one that a killed machine left half written is compiled again.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::xxh3_64;

use super::driver::Device;
use super::kernels::{HEADERS, Kernel, SOURCES};
use super::nvrtc::Nvrtc;
use crate::error::{Error, Result};

/// What all kernels are compiled with, beside the architecture.
pub const OPTIONS: [&str; 1] = ["--std=c++17"];

/// What Python found out at import: folders and libraries.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Of the wheel's cubins.
    pub packed: Option<PathBuf>,
    /// Of compiled ones; None: they are not kept.
    pub cache: Option<PathBuf>,
    /// Libraries to try, in order.
    pub nvrtc: Vec<String>,
}

static SETUP: Mutex<Option<Setup>> = Mutex::new(None);

/// Says where things are. Kernels that are loaded already stay.
pub fn set_up(setup: Setup) {
    *SETUP.lock().unwrap_or_else(PoisonError::into_inner) = Some(setup);
}

/// Where things are.
pub fn setup() -> Setup {
    SETUP.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
}

/// The digest that the wheel's manifest has of a source: itself, all headers, and the options.
pub fn source_hash(source: &str) -> String {
    hex(&hashed(source).finalize())
}

fn hashed(source: &str) -> Sha256 {
    let mut digest = Sha256::new();
    let body = SOURCES.iter().find(|s| s.0 == source).map_or("", |s| s.1);
    for (name, text) in std::iter::once((source, body)).chain(HEADERS.iter().copied()) {
        digest.update(name.as_bytes());
        digest.update(b"\0");
        digest.update(text.len().to_string().as_bytes());
        digest.update(b"\0");
        digest.update(text.as_bytes());
    }
    digest.update(b"options\0");
    digest.update(OPTIONS.join("\n").as_bytes());
    digest
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The NVRTC that was found first.
///
/// # Errors
/// [`Error::Device`]: none of them can be loaded.
pub fn nvrtc() -> Result<&'static Nvrtc> {
    static FOUND: OnceLock<Nvrtc> = OnceLock::new();
    if let Some(n) = FOUND.get() {
        return Ok(n);
    }
    let mut why = Vec::new();
    for path in setup().nvrtc {
        match Nvrtc::open(&path) {
            Ok(n) => return Ok(FOUND.get_or_init(|| n)),
            Err(e) => why.push(e.to_string()),
        }
    }
    Err(Error::Device(format!(
        "expected NVRTC, the CUDA compiler that torch's wheels bring (libnvrtc), and it was not found: {}",
        if why.is_empty() { "nowhere to look".into() } else { why.join("; ") }
    )))
}

/// "sm_90a", "sm_80": the architecture of a device, with the suffix that its own instructions need.
pub fn arch(capability: (i32, i32)) -> String {
    let (major, minor) = capability;
    format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
}

/// Machine code of a kernel for a device.
///
/// # Errors
/// [`Error::Device`]: there is none, and none can be made.
pub fn image(device: &Device, kernel: &Kernel) -> Result<Vec<u8>> {
    let arch = arch(device.capability);
    if let Some(found) = packed(kernel.source, device.capability) {
        return Ok(found);
    }
    let nvrtc = nvrtc().map_err(|e| {
        Error::Device(format!("{}: this package has no kernels for {} ({arch}). {e}", kernel.entry, device.name))
    })?;
    let mut digest = hashed(kernel.source);
    digest.update(format!("\0{arch}\0{}.{}", nvrtc.version.0, nvrtc.version.1).as_bytes());
    let key = hex(&digest.finalize());
    let setup = setup();
    let place = setup.cache.as_ref().map(|folder| folder.join(format!("{key}.cubin")));
    if let Some(found) = place.as_deref().and_then(kept) {
        return Ok(found);
    }
    let image = compile(nvrtc, kernel.source, &arch)?.image;
    if let Some(place) = &place {
        keep(place, &image);
    }
    Ok(image)
}

/// Compiles one of our sources.
///
/// # Errors
/// [`Error::Device`] with the compiler's words, or where there is no such source.
pub fn compile(nvrtc: &Nvrtc, source: &str, arch: &str) -> Result<super::nvrtc::Compiled> {
    let Some((_, text)) = SOURCES.iter().find(|s| s.0 == source) else {
        let names: Vec<_> = SOURCES.iter().map(|s| s.0).collect();
        return Err(Error::value("source", names.join(", "), source));
    };
    let mut options: Vec<String> = OPTIONS.iter().map(ToString::to_string).collect();
    options.push("--ptxas-options=-v".into()); // for the log only
    nvrtc.compile(source, text, HEADERS, arch, &options)
}

/// A cubin of the wheel: of exactly this source, for this architecture or, without a suffix, an older one of the same
/// generation.
fn packed(source: &str, capability: (i32, i32)) -> Option<Vec<u8>> {
    let folder = setup().packed?;
    let stem = source.strip_suffix(".cu")?;
    let (major, minor) = capability;
    let mut archs = vec![format!("sm_{major}{minor}a")];
    archs.extend((0..=minor).rev().map(|m| format!("sm_{major}{m}")));
    let hash = source_hash(source);
    let hashes = std::fs::read_to_string(folder.join("hashes.txt")).ok()?;
    for arch in archs {
        let file = format!("{stem}.{arch}.cubin");
        // A line of the manifest: file, hash of the source, hash of the cubin.
        let line = hashes.lines().map(|l| l.split(' ').collect::<Vec<_>>()).find(|l| l.first() == Some(&file.as_str()));
        let Some([_, of_source, of_cubin]) = line.as_deref() else { continue };
        if *of_source != hash {
            continue; // built from another state of the tree
        }
        if let Ok(bytes) = std::fs::read(folder.join(&file))
            && hex(&Sha256::digest(&bytes)) == *of_cubin
        {
            return Some(bytes);
        }
    }
    None
}

/// Architectures that the wheel carries cubins for.
pub fn packed_archs() -> Vec<String> {
    let Some(text) = setup().packed.and_then(|f| std::fs::read_to_string(f.join("hashes.txt")).ok()) else {
        return Vec::new();
    };
    let file = |line: &str| line.split(' ').next().and_then(|f| f.split('.').nth(1)).map(String::from);
    let mut archs: Vec<String> = text.lines().filter_map(file).collect();
    archs.sort();
    archs.dedup();
    archs
}

fn kept(place: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(place).ok()?;
    let body = bytes.len().checked_sub(8)?;
    let sum = u64::from_le_bytes(bytes[body..].try_into().ok()?);
    bytes.truncate(body);
    (xxh3_64(&bytes) == sum && !bytes.is_empty()).then_some(bytes)
}

/// Keeps an image if it can be kept: a full disk or a read-only folder costs the next process a compilation, no more.
fn keep(place: &Path, image: &[u8]) {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let Some(folder) = place.parent() else { return };
    let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let temporary = place.with_extension(format!("{}.{n}.tmp", std::process::id()));
    let written = (|| {
        std::fs::create_dir_all(folder)?;
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(image)?;
        file.write_all(&xxh3_64(image).to_le_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, place)
    })();
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
}
