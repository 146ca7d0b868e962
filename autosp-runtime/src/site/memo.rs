//! What a checkpoint scope keeps of one run of a site.

use autosp_plan::codes;
use autosp_plan::settings::Policy;
use candle_core::Tensor;

use crate::attention::Output;
use crate::error::{Error, Result};
use crate::memory::Extent;

/// The part of a forward that its replay begins with, group by group.
#[derive(Debug)]
pub(crate) struct Memo {
    site: &'static str,
    pub(super) groups: Vec<Remembered>,
}

/// One group, in head layout.
#[derive(Debug, Clone)]
pub(super) struct Remembered {
    /// Q [b, heads, S, d], and keys and values [b, kv heads, S, ..] of the kv heads that came with this group.
    pub(super) qkv: Option<(Tensor, Option<(Tensor, Tensor)>)>,
    pub(super) output: Output,
}

impl Memo {
    /// Keeps what `policy` says of each group's Q, (K, V) and result. On one rank Q, K and V are the model's own tensors, which may be
    /// views of more.
    pub(super) fn new(
        site: &'static str,
        policy: Policy,
        ranks: usize,
        groups: impl IntoIterator<Item = (Tensor, Option<(Tensor, Tensor)>, Output)>,
    ) -> Result<Self> {
        let own = |x: Tensor| if ranks == 1 { alone(&x) } else { Ok(x) };
        let keep = |(q, kv, output): (Tensor, Option<(Tensor, Tensor)>, Output)| {
            let qkv = match policy {
                Policy::Qkv => {
                    let kv = kv.map(|(k, v)| Ok::<_, Error>((own(k)?, own(v)?)));
                    Some((own(q)?, kv.transpose()?))
                }
                Policy::All | Policy::Attention | Policy::Input => None,
            };
            Ok(Remembered { qkv, output })
        };
        Ok(Self {
            site,
            groups: groups.into_iter().map(keep).collect::<Result<_>>()?,
        })
    }

    /// Bytes of all tensors.
    pub(crate) fn bytes(&self) -> u64 {
        self.tensors().iter().map(bytes).sum()
    }

    /// All tensors, in the order in which [`of`](Self::of) takes them.
    pub(crate) fn tensors(&self) -> Vec<Tensor> {
        let mut tensors = Vec::new();
        let _ = self.map(&mut |x| {
            tensors.push(x.clone());
            Ok(x.clone())
        });
        tensors
    }

    /// The same without the tensors' memory.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn emptied(&self) -> Result<Self> {
        self.map(&mut |x| Ok(Tensor::zeros(0, x.dtype(), x.device())?))
    }

    /// The same with other tensors.
    ///
    /// # Errors
    /// AS0351 if there are too few.
    pub(crate) fn of(&self, tensors: &mut impl Iterator<Item = Tensor>) -> Result<Self> {
        self.map(&mut |_| {
            let text = "what a site has kept on the host is not all there";
            tensors
                .next()
                .ok_or_else(|| Error::new(codes::REPLAY, text))
        })
    }

    fn map(&self, change: &mut impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let mut of = |group: &Remembered| {
            let Output { o, lse, rest } = &group.output;
            let output = Output {
                o: change(o)?,
                lse: change(lse)?,
                rest: change(rest)?,
            };
            let qkv = match &group.qkv {
                Some((q, kv)) => {
                    let q = change(q)?;
                    let kv = match kv {
                        Some((k, v)) => Some((change(k)?, change(v)?)),
                        None => None,
                    };
                    Some((q, kv))
                }
                None => None,
            };
            Ok::<_, Error>(Remembered { qkv, output })
        };
        Ok(Self {
            site: self.site,
            groups: self.groups.iter().map(&mut of).collect::<Result<_>>()?,
        })
    }

    /// Makes sure that a block which is computed again comes to the same site with as many groups.
    ///
    /// # Errors
    /// AS0351 naming both sites.
    pub(super) fn expect(&self, site: &'static str, groups: usize) -> Result<()> {
        if self.site == site && self.groups.len() == groups {
            return Ok(());
        }
        let text = format!(
            "expected `{}` in {} head groups, as in the forward, found `{site}` in {groups}",
            self.site,
            self.groups.len()
        );
        Err(Error::new(codes::REPLAY, text))
    }
}

/// Bytes of a tensor's elements.
pub(crate) fn bytes(x: &Tensor) -> u64 {
    (x.elem_count() * x.dtype().size_in_bytes()) as u64
}

/// The tensor, or a copy where it is a view of more: keeping it would keep all of that.
fn alone(x: &Tensor) -> Result<Tensor> {
    let stored = Extent::of(x).map(|extent| extent.elements);
    if x.device().is_cpu() && stored == Some(x.elem_count()) {
        return Ok(x.clone());
    }
    Ok(x.force_contiguous()?)
}
