//! Sites on thread ranks against candle's slow operations on one device.

mod policies;

use candle_core::{D, DType, Device, Result, Tensor, Var};

use super::exchange_bytes;
use crate::layout::Layout;
use crate::mask::{Band, Mask, mask_rule};
use crate::run_with;
use crate::schedule::{Backward, Forward, HeadMap, Schedule, Site, Timeline, Ulysses};
use crate::scope::Shard;
use crate::scores::{scores, softmax};
use crate::{Error, Settings, Sp, rt};

const CPU: Device = Device::Cpu;

/// The schedule that the attribute emits.
macro_rules! emitted {
    ($site:ident, $name:literal, $layout:expr, $heads:expr) => {
        struct $site;
        impl Site for $site {
            const LINE: u32 = 1;
            const LAYOUT: Layout = $layout;
            const HEADS: HeadMap = $heads;
        }
        impl Schedule<Ulysses> for $site {
            const NAME: &'static str = $name;
            fn forward(io: &mut impl Forward) -> Result<()> {
                io.send_qkv(0)?;
                for g in 0..io.groups() {
                    if g + 1 < io.groups() {
                        io.send_qkv(g + 1)?;
                    }
                    io.wait_qkv(g)?;
                    io.attend(g)?;
                    io.send_out(g)?;
                }
                io.wait_out()
            }
            fn replay(io: &mut impl Forward) -> Result<()> {
                for g in 0..io.groups() {
                    io.send_qkv(g)?;
                    io.send_out(g)?;
                }
                for g in 0..io.groups() {
                    io.wait_qkv(g)?;
                }
                io.wait_out()
            }
            fn backward(io: &mut impl Backward) -> Result<()> {
                io.send_grad_out(0)?;
                for g in 0..io.groups() {
                    if g + 1 < io.groups() {
                        io.send_grad_out(g + 1)?;
                    }
                    io.wait_grad_out(g)?;
                    io.attend_backward(g)?;
                    io.send_grad_qkv(g)?;
                }
                io.wait_grad_qkv()
            }
        }
    };
}

emitted!(
    Plain,
    "m::plain",
    Layout {
        q: "b h s d",
        k: "b g d s",
        v: "b g s d"
    },
    HeadMap::Blocked
);
emitted!(
    Turned,
    "m::turned",
    Layout {
        q: "s b h d",
        k: "s b g d",
        v: "s b g d"
    },
    HeadMap::Interleaved
);

/// The same work one group after the other, last group first, and its backward without overlap.
struct Sequential;
impl Site for Sequential {
    const LINE: u32 = 1;
    const LAYOUT: Layout = Plain::LAYOUT;
    const HEADS: HeadMap = HeadMap::Blocked;
}
impl Schedule<Ulysses> for Sequential {
    const NAME: &'static str = "m::sequential";
    fn forward(io: &mut impl Forward) -> Result<()> {
        for g in (0..io.groups()).rev() {
            io.send_qkv(g)?;
            io.wait_qkv(g)?;
            io.attend(g)?;
            io.send_out(g)?;
        }
        io.wait_out()
    }
    fn replay(io: &mut impl Forward) -> Result<()> {
        for g in (0..io.groups()).rev() {
            io.send_qkv(g)?;
            io.wait_qkv(g)?;
            io.send_out(g)?;
        }
        io.wait_out()
    }
    fn backward(io: &mut impl Backward) -> Result<()> {
        for g in (0..io.groups()).rev() {
            io.send_grad_out(g)?;
            io.wait_grad_out(g)?;
            io.attend_backward(g)?;
            io.send_grad_qkv(g)?;
        }
        io.wait_grad_qkv()
    }
}

fn noise(seed: u64, dims: &[usize]) -> Tensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let values: Vec<f32> = (0..dims.iter().product())
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f64 / f64::from(1 << 23) - 1.0) as f32
        })
        .collect();
    Tensor::from_vec(values, dims, &CPU).unwrap()
}

#[derive(Debug, Clone, Copy)]
struct Case {
    sp: usize,
    groups: usize,
    kv_heads: usize,
    valid: usize,
    batch: usize,
    dv: usize,
    heads: HeadMap,
    /// Visible distance j - i; the mask has no band.
    window: Option<i64>,
}

const BASE: Case = Case {
    sp: 4,
    groups: 2,
    kv_heads: 2,
    valid: 61,
    batch: 2,
    dv: 8,
    heads: HeadMap::Blocked,
    window: None,
};
const HEADS: usize = 8;
const WIDTH: usize = 8;
const SCALE: f64 = 0.6;

impl Case {
    fn shard(&self, rank: usize) -> Shard {
        Shard::new(self.valid, rank, self.sp)
    }

    /// q, k, v and the weights of the loss, over the padded sequence: padding is not zero.
    fn inputs(&self) -> [Tensor; 4] {
        let n = self.shard(0).padded;
        [
            (HEADS, WIDTH),
            (self.kv_heads, WIDTH),
            (self.kv_heads, self.dv),
            (HEADS, self.dv),
        ]
        .map(|(h, d)| noise((h * 31 + d) as u64, &[self.batch, h, n, d]))
    }

    fn visible(&self, i: usize, j: usize) -> bool {
        let band = Band {
            lo: self.window.map(|window| 1 - window),
            hi: Some(0),
        };
        band.contains(i, j)
    }

    /// O and the gradients of sum(O * w) by candle, over the padded sequence with zeros in the padding.
    fn slow(&self) -> [Tensor; 4] {
        let inputs = self.inputs();
        let vars = [0, 1, 2].map(|at| Var::from_tensor(&inputs[at]).unwrap());
        let n = self.valid;
        let cut = |x: &Tensor| x.narrow(2, 0, n).unwrap();
        let map: Vec<u32> = (0..HEADS)
            .map(|h| self.heads.kv_of(h, HEADS, self.kv_heads) as u32)
            .collect();
        let map = Tensor::new(map, &CPU).unwrap();
        let repeat = |x: &Tensor| cut(x).contiguous().unwrap().index_select(&map, 1).unwrap();
        let (q, k, v) = (cut(&vars[0]), repeat(&vars[1]), repeat(&vars[2]));
        let scores = (q.contiguous().unwrap().matmul(&k.t().unwrap()).unwrap() * SCALE).unwrap();
        let mask: Vec<u8> = (0..n * n)
            .map(|at| u8::from(!self.visible(at / n, at % n)))
            .collect();
        let mask = Tensor::from_vec(mask, (n, n), &CPU)
            .unwrap()
            .broadcast_as(scores.shape())
            .unwrap();
        let fill = Tensor::new(f32::NEG_INFINITY, &CPU)
            .unwrap()
            .broadcast_as(scores.shape())
            .unwrap();
        let scores = mask.where_cond(&fill, &scores).unwrap();
        let o = candle_nn::ops::softmax(&scores, D::Minus1)
            .unwrap()
            .matmul(&v)
            .unwrap();
        let grads = (&o * cut(&inputs[3]))
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        let o = o
            .detach()
            .pad_with_zeros(2, 0, self.shard(0).padded - n)
            .unwrap();
        let [dq, dk, dv] = vars.map(|var| grads.get(&var).unwrap().detach());
        [o, dq, dk, dv]
    }

    fn settings(&self) -> Settings {
        Settings::default()
            .with_sp(self.sp)
            .with_groups(self.groups)
    }

    /// One rank: its O, gradients, and exchange bytes of forward and backward.
    fn rank<S: Site>(&self, sp: &Sp) -> crate::Result<([Tensor; 4], [u64; 2])> {
        let shard = self.shard(sp.sp_rank());
        let [q, k, v, w] = self.inputs().map(|x| {
            x.narrow(2, shard.start, shard.len)
                .unwrap()
                .contiguous()
                .unwrap()
        });
        let vars = [
            Var::from_tensor(&q)?,
            Var::from_tensor(&k)?,
            Var::from_tensor(&v)?,
        ];
        let order = |axes: &str, x: &Tensor| {
            let dims: Vec<usize> = axes
                .split(' ')
                .map(|axis| {
                    ["b", "h", "s", "d"]
                        .iter()
                        .position(|a| *a == axis.replace('g', "h"))
                        .unwrap()
                })
                .collect();
            x.permute(dims)
        };
        let layout = S::LAYOUT;
        let before = sp.ledger().snapshot();
        let out = sp.scope(|| -> crate::Result<Tensor> {
            enter(sp, shard)?;
            let scores = scores::<S>(&order(layout.q, &vars[0])?, &order(layout.k, &vars[1])?)?;
            let n = rt::valid(shard.len);
            let case = *self;
            let host = mask_rule(n, n, move |i, j| u8::from(!case.visible(i, j)));
            let host = match self.window {
                None => host.band(
                    Band {
                        lo: None,
                        hi: Some(0),
                    },
                    0,
                    1,
                ),
                Some(_) => host,
            };
            let mask = Mask::from_slice(&host, (n, n), &CPU)?.broadcast_as(scores.shape())?;
            let fill = Tensor::new(f32::NEG_INFINITY, scores.device())?
                .broadcast_as(mask.shape().dims())?;
            let scores = mask.where_cond(&fill, &(scores * SCALE)?)?;
            Ok(softmax(&scores)?.matmul(&order(layout.v, &vars[2])?)?)
        })?;
        let between = sp.ledger().snapshot();
        // Back from the axes of the values to (b, h, s, d).
        let axes: Vec<&str> = layout.v.split(' ').collect();
        let back = ["b", "g", "s", "d"].map(|axis| axes.iter().position(|a| *a == axis).unwrap());
        let out = out.permute(back)?;
        let grads = (&out * w)?.sum_all()?.backward()?;
        let bytes = [
            between.exchange - before.exchange,
            sp.ledger().since(between).exchange,
        ];
        let [dq, dk, dv] = vars.map(|var| grads.get(&var).unwrap().detach());
        Ok(([out.detach(), dq, dk, dv], bytes))
    }

    fn run<S: Site>(&self) -> ([Tensor; 4], Vec<[u64; 2]>) {
        let ranks = run_with(self.settings(), |sp| self.rank::<S>(sp)).unwrap();
        let whole = [0, 1, 2, 3].map(|at| {
            let shards: Vec<_> = ranks
                .iter()
                .map(|(tensors, _)| tensors[at].clone())
                .collect();
            Tensor::cat(&shards, 2).unwrap()
        });
        (whole, ranks.iter().map(|(_, bytes)| *bytes).collect())
    }

    fn check<S: Site>(&self) {
        let (got, bytes) = self.run::<S>();
        for ((name, got), want) in ["o", "dq", "dk", "dv"].iter().zip(&got).zip(&self.slow()) {
            close(&format!("{name} of {self:?}"), got, want);
        }
        let formula = exchange_bytes(
            self.batch,
            (HEADS, self.kv_heads),
            (WIDTH, self.dv),
            self.shard(0).padded,
            self.sp,
            4,
        );
        for rank in bytes {
            assert_eq!(rank, [formula, formula], "{self:?}");
        }
    }
}

/// Makes `shard` that of the forward in progress, as a model's entry does.
fn enter(sp: &Sp, shard: Shard) -> crate::Result<()> {
    let tokens = Tensor::zeros((1, shard.len), DType::U32, &CPU)?;
    sp.register_shard(tokens.id(), shard)?;
    Ok(rt::enter("m::forward", &[("tokens", &tokens, 1)])?)
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn close(name: &str, got: &Tensor, want: &Tensor) {
    assert_eq!(got.dims(), want.dims(), "{name}");
    for (at, (a, b)) in flat(got).into_iter().zip(flat(want)).enumerate() {
        assert!(
            (a - b).abs() <= 1e-5 * (1.0 + b.abs()),
            "{name}[{at}]: {a} against {b}"
        );
    }
}

#[test]
fn ranks_groups_heads_and_padding_change_nothing_but_the_work() {
    for sp in [1, 2, 4] {
        for kv_heads in [1, 2, 4] {
            for groups in 1..=4 {
                for valid in [64, 61] {
                    Case {
                        sp,
                        groups,
                        kv_heads,
                        valid,
                        ..BASE
                    }
                    .check::<Plain>();
                }
            }
        }
    }
}

#[test]
fn ranks_may_hold_nothing_but_padding() {
    for valid in [5, 2, 1] {
        for kv_heads in [1, 4] {
            Case {
                kv_heads,
                valid,
                ..BASE
            }
            .check::<Plain>();
        }
    }
}

#[test]
fn the_formula_is_the_one_of_the_plan() {
    // (2q + 2k') · bytes · (S_pad / P) · (P - 1) / P · b with q = H d and k' = d max(G, P).
    for (kv_heads, ranks) in [(1, 4), (2, 4), (4, 4), (8, 4), (4, 2), (4, 1)] {
        let (heads, d, padded, batch) = (8, 16, 64, 3);
        let want = (2 * heads * d + 2 * d * usize::max(kv_heads, ranks))
            * 4
            * (padded / ranks)
            * (ranks - 1)
            / ranks
            * batch;
        assert_eq!(
            exchange_bytes(batch, (heads, kv_heads), (d, d), padded, ranks, 4),
            want as u64
        );
    }
}

#[test]
fn interleaved_heads_other_axes_and_a_mask_without_a_band() {
    for (kv_heads, groups) in [(1, 2), (2, 1), (4, 2), (8, 2)] {
        for sp in [1, 2, 4] {
            let case = Case {
                sp,
                groups,
                kv_heads,
                heads: HeadMap::Interleaved,
                window: Some(9),
                ..BASE
            };
            case.check::<Turned>();
        }
    }
}

#[test]
fn values_may_be_wider_or_narrower_than_keys() {
    for dv in [5, 12] {
        Case { dv, ..BASE }.check::<Plain>();
        Case {
            dv,
            sp: 2,
            kv_heads: 4,
            groups: 3,
            ..BASE
        }
        .check::<Plain>();
    }
}

#[test]
fn two_runs_are_bitwise_equal() {
    let case = Case {
        kv_heads: 1,
        groups: 2,
        ..BASE
    };
    let bits = || {
        case.run::<Plain>()
            .0
            .map(|x| flat(&x).into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    assert!(bits() == bits());
}

#[test]
fn another_schedule_runs_in_its_own_order_with_the_same_result() {
    let case = Case {
        sp: 2,
        kv_heads: 1,
        groups: 4,
        ..BASE
    };
    case.check::<Sequential>();

    let verbs = |timeline: &Timeline| {
        let events = timeline.events();
        events
            .iter()
            .filter(|event| event.rank == 0)
            .map(|event| (event.verb, event.group))
            .collect::<Vec<_>>()
    };
    let (plain, sequential) = (Timeline::default(), Timeline::default());
    run_with(case.settings(), |sp| {
        {
            let _recording = plain.attach();
            case.rank::<Plain>(sp)?;
        }
        let _recording = sequential.attach();
        case.rank::<Sequential>(sp)
    })
    .unwrap();
    assert_eq!(
        verbs(&plain)[..3],
        [("send_qkv", 0), ("send_qkv", 1), ("wait_qkv", 0)]
    );
    assert_eq!(
        verbs(&sequential)[..3],
        [("send_qkv", 3), ("wait_qkv", 3), ("attend", 3)]
    );
    assert_eq!(verbs(&plain).len(), verbs(&sequential).len());
}

#[test]
fn the_next_exchange_starts_before_attention_ends() {
    let case = Case {
        sp: 2,
        kv_heads: 4,
        groups: 2,
        valid: 256,
        ..BASE
    };
    let timeline = Timeline::default();
    run_with(case.settings(), |sp| {
        let _recording = timeline.attach();
        case.rank::<Plain>(sp)
    })
    .unwrap();
    let at = |rank, verb, group| {
        let events = timeline.events();
        *events
            .iter()
            .find(|e| (e.rank, e.verb, e.group) == (rank, verb, group))
            .unwrap()
    };
    for rank in 0..2 {
        assert!(at(rank, "send_qkv", 1).start < at(rank, "attend", 0).end);
        assert!(at(rank, "send_grad_out", 1).start < at(rank, "attend_backward", 0).end);
    }
    assert!(timeline.to_string().contains("attend(0)"), "{timeline}");
}

#[test]
fn one_rank_copies_and_sends_nothing() {
    let case = Case { sp: 1, ..BASE };
    let (_, bytes) = case.run::<Plain>();
    assert_eq!(bytes, [[0, 0]]);
}

#[test]
fn without_variables_nothing_is_recorded() {
    let case = BASE;
    run_with(case.settings(), |sp| {
        let shard = case.shard(sp.sp_rank());
        let [q, k, v, _] = case
            .inputs()
            .map(|x| x.narrow(2, shard.start, shard.len).unwrap());
        sp.scope(|| {
            enter(sp, shard)?;
            let out = softmax(&scores::<Plain>(&q, &k.t()?)?)?.matmul(&v)?;
            assert!(!out.track_op());
            Ok::<_, Error>(())
        })
    })
    .unwrap();
}

#[test]
fn heads_that_do_not_fit_and_a_missing_scope_are_errors() {
    let case = Case {
        kv_heads: 4,
        ..BASE
    };
    let refused = run_with(Settings::default().with_sp(3), |sp| {
        let case = Case { sp: 3, ..case };
        case.rank::<Plain>(sp)
    });
    let text = refused.unwrap_err().to_string();
    assert!(
        text.contains("AS0321") && text.contains("expected sp among 1, 2, 4, 8, found 3"),
        "{text}"
    );

    let [q, k, ..] = case.inputs();
    let outside = Error::from(scores::<Plain>(&q, &k.t().unwrap()).unwrap_err());
    assert_eq!(outside.code().id, "AS0305");

    let shapes = run_with(Settings::default(), |sp| {
        sp.scope(|| {
            enter(sp, Shard::new(32, 0, 1))?;
            Ok(scores::<Plain>(&q, &k.t()?).map(drop)?)
        })
    });
    assert_eq!(shapes.unwrap_err().code().id, "AS0323");
}
