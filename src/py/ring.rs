//! The schedule of ring attention for Python: numbers in, numbers out.

use pyo3::exceptions::{PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::error::raise;
use crate::error::Error;
use crate::ring::{self, Cluster, Pass, Piece, Ring, Sharding, TokenBytes, Work, documents_of};

/// `(q_lo, q_hi, k_lo, k_hi, causal, q_start)`.
type PieceTuple = (u64, u64, u64, u64, bool, u64);
/// `(step, source, needed, pieces, receive_from, inner_to, outer_to)`.
type StepTuple = (u64, u64, bool, Vec<PieceTuple>, Option<u64>, Option<u64>, Option<u64>);
/// `(peer, source)` of each message sent, and of each received.
type ExchangeTuple = (Vec<(u64, u64)>, Vec<(u64, u64)>);

/// A number from 0 on; anything that is no integer is a TypeError, any other one a ValueError.
fn count(name: &str, value: &Bound<'_, PyAny>) -> PyResult<u64> {
    match value.extract::<u64>() {
        Ok(n) => Ok(n),
        Err(e) if e.is_instance_of::<PyOverflowError>(value.py()) => {
            Err(raise(Error::value(name, "a number from 0 to 2^64 - 1", value.repr()?)))
        }
        Err(e) if e.is_instance_of::<PyTypeError>(value.py()) => {
            Err(raise(Error::type_(name, "an int", value.get_type().name()?)))
        }
        Err(e) => Err(e),
    }
}

fn starts(documents: Option<&Bound<'_, PyAny>>, length: u64) -> PyResult<Vec<u64>> {
    let Some(list) = documents else { return Ok(vec![0]) };
    let mut found = vec![];
    for (i, start) in list.try_iter()?.enumerate() {
        found.push(count(&format!("documents[{i}]"), &start?)?);
    }
    documents_of(Some(found), length).map_err(raise)
}

fn ring_of(
    sharding: &str,
    length: &Bound<'_, PyAny>,
    inner: &Bound<'_, PyAny>,
    outer: &Bound<'_, PyAny>,
    causal: bool,
    documents: Option<&Bound<'_, PyAny>>,
) -> PyResult<Ring> {
    let sharding: Sharding = sharding.parse().map_err(raise)?;
    let length = count("length", length)?;
    let (inner, outer) = (count("inner", inner)?, count("outer", outer)?);
    Ring::new(sharding, length, inner, outer, causal, starts(documents, length)?).map_err(raise)
}

/// Positions that a rank holds.
#[pyfunction]
pub fn ring_shard(
    sharding: &str,
    length: &Bound<'_, PyAny>,
    ranks: &Bound<'_, PyAny>,
    rank: &Bound<'_, PyAny>,
) -> PyResult<Vec<(u64, u64, u64)>> {
    let sharding = sharding.parse().map_err(raise)?;
    let runs = ring::shard(sharding, count("length", length)?, count("ranks", ranks)?, count("rank", rank)?);
    Ok(runs.map_err(raise)?.into_iter().map(|r| (r.start, r.stop, r.step)).collect())
}

/// The steps of a rank.
#[pyfunction]
#[pyo3(signature = (sharding, length, inner, outer, rank, causal=true, documents=None))]
#[allow(clippy::too_many_arguments)] // Python's keywords
pub fn ring_schedule(
    py: Python<'_>,
    sharding: &str,
    length: &Bound<'_, PyAny>,
    inner: &Bound<'_, PyAny>,
    outer: &Bound<'_, PyAny>,
    rank: &Bound<'_, PyAny>,
    causal: bool,
    documents: Option<&Bound<'_, PyAny>>,
) -> PyResult<Vec<StepTuple>> {
    let ring = ring_of(sharding, length, inner, outer, causal, documents)?;
    let rank = count("rank", rank)?;
    let steps = py.detach(|| ring.steps(rank)).map_err(raise)?;
    let tuple = |p: &Piece| (p.q_lo, p.q_hi, p.k_lo, p.k_hi, p.causal, p.q_start);
    let steps = steps.into_iter().map(|s| {
        let pieces: Vec<_> = s.pieces.iter().map(tuple).collect();
        (s.step, s.source, !pieces.is_empty(), pieces, s.receive_from, s.inner_to, s.outer_to)
    });
    Ok(steps.collect())
}

/// The exchanges of gradients of a rank.
#[pyfunction]
#[pyo3(signature = (sharding, length, inner, outer, rank, causal=true, documents=None))]
#[allow(clippy::too_many_arguments)] // Python's keywords
pub fn ring_gradients(
    py: Python<'_>,
    sharding: &str,
    length: &Bound<'_, PyAny>,
    inner: &Bound<'_, PyAny>,
    outer: &Bound<'_, PyAny>,
    rank: &Bound<'_, PyAny>,
    causal: bool,
    documents: Option<&Bound<'_, PyAny>>,
) -> PyResult<Vec<ExchangeTuple>> {
    let ring = ring_of(sharding, length, inner, outer, causal, documents)?;
    let rank = count("rank", rank)?;
    let list = py.detach(|| ring.exchanges(rank)).map_err(raise)?;
    Ok(list.into_iter().map(|e| (e.sends, e.receives)).collect())
}

/// Bytes that each rank sends.
#[pyfunction]
#[pyo3(signature = (sharding, length, inner, outer, *, per_node, kv_bytes, kv_group_bytes=None, gradient_bytes=None, causal=true, documents=None))]
#[allow(clippy::too_many_arguments)] // Python's keywords
pub fn ring_bytes(
    py: Python<'_>,
    sharding: &str,
    length: &Bound<'_, PyAny>,
    inner: &Bound<'_, PyAny>,
    outer: &Bound<'_, PyAny>,
    per_node: &Bound<'_, PyAny>,
    kv_bytes: &Bound<'_, PyAny>,
    kv_group_bytes: Option<&Bound<'_, PyAny>>,
    gradient_bytes: Option<&Bound<'_, PyAny>>,
    causal: bool,
    documents: Option<&Bound<'_, PyAny>>,
) -> PyResult<Vec<(u128, u128, u128, u128)>> {
    let ring = ring_of(sharding, length, inner, outer, causal, documents)?;
    let per_node = count("per_node", per_node)?;
    let given = |name, value: Option<&Bound<'_, PyAny>>| value.map_or(Ok(0), |n| count(name, n));
    let bytes = TokenBytes {
        kv: count("kv_bytes", kv_bytes)?,
        kv_group: given("kv_group_bytes", kv_group_bytes)?,
        gradients: given("gradient_bytes", gradient_bytes)?,
    };
    let sent = py.detach(|| ring.sent(per_node, bytes)).map_err(raise)?;
    Ok(sent.iter().map(|s| (s.forward_within, s.forward_across, s.backward_within, s.backward_across)).collect())
}

/// Largest work of a rank over the mean.
#[pyfunction]
#[pyo3(signature = (sharding, length, ranks, causal=true, documents=None))]
pub fn ring_balance(
    py: Python<'_>,
    sharding: &str,
    length: &Bound<'_, PyAny>,
    ranks: &Bound<'_, PyAny>,
    causal: bool,
    documents: Option<&Bound<'_, PyAny>>,
) -> PyResult<f64> {
    let sharding = sharding.parse().map_err(raise)?;
    let (length, ranks) = (count("length", length)?, count("ranks", ranks)?);
    let starts = starts(documents, length)?;
    py.detach(|| ring::balance(sharding, length, ranks, causal, &starts)).map_err(raise)
}

fn pass<'py>(py: Python<'py>, p: &Pass) -> PyResult<Bound<'py, PyDict>> {
    let found = PyDict::new(py);
    for (name, seconds) in [("seconds", p.seconds), ("compute", p.compute), ("exchange", p.exchange)] {
        found.set_item(name, seconds)?;
    }
    for (name, bytes) in
        [("within", p.within), ("across", p.across), ("ring_within", p.ring_within), ("ring_across", p.ring_across)]
    {
        found.set_item(name, bytes)?;
    }
    Ok(found)
}

/// Every layout of a cluster, the best first, with what one layer's attention over one sequence costs.
#[pyfunction]
#[pyo3(signature = (*, nodes, gpus, intra, inter, rails, latency, flops, length, q_heads, kv_heads, head_dim, itemsize, causal=true, training=false))]
#[allow(clippy::too_many_arguments)] // Python's keywords
pub fn ring_topology<'py>(
    py: Python<'py>,
    nodes: &Bound<'py, PyAny>,
    gpus: &Bound<'py, PyAny>,
    intra: f64,
    inter: f64,
    rails: &Bound<'py, PyAny>,
    latency: f64,
    flops: f64,
    length: &Bound<'py, PyAny>,
    q_heads: &Bound<'py, PyAny>,
    kv_heads: &Bound<'py, PyAny>,
    head_dim: &Bound<'py, PyAny>,
    itemsize: &Bound<'py, PyAny>,
    causal: bool,
    training: bool,
) -> PyResult<Vec<Bound<'py, PyDict>>> {
    let (nodes, gpus, rails) = (count("nodes", nodes)?, count("gpus", gpus)?, count("rails", rails)?);
    let cluster = Cluster { nodes, gpus, intra, inter, rails, latency, flops };
    let work = Work {
        length: count("length", length)?,
        q_heads: count("q_heads", q_heads)?,
        kv_heads: count("kv_heads", kv_heads)?,
        head_dim: count("head_dim", head_dim)?,
        itemsize: count("itemsize", itemsize)?,
        causal,
    };
    let costs = py.detach(|| ring::layouts(&cluster, &work, training)).map_err(raise)?;
    let one = |c: &ring::Cost| {
        let found = PyDict::new(py);
        for (name, n) in
            [("heads", c.layout.heads), ("inner", c.layout.inner), ("outer", c.layout.outer), ("messages", c.messages)]
        {
            found.set_item(name, n)?;
        }
        found.set_item("replication", c.replication)?;
        found.set_item("forward", pass(py, &c.forward)?)?;
        found.set_item("backward", pass(py, &c.backward)?)?;
        Ok(found)
    };
    costs.iter().map(one).collect()
}
