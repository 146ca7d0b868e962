//! What may be done to scores, in which order and in which form, against the same on candle's tensors.

use candle_core::{D, DType, Device, Result, Tensor};

use super::{Scores, scores, softmax};
use crate::layout::Layout;
use crate::mask::{Mask, mask_rule};
use crate::schedule::{Backward, Forward, HeadMap, Schedule, Site, Ulysses};
use crate::scope::Shard;
use crate::{Error, Settings, rt, run_with};

const CPU: Device = Device::Cpu;
const BATCH: usize = 2;
const HEADS: usize = 4;
const LENGTH: usize = 13;
const WIDTH: usize = 6;

struct Here;
impl Site for Here {
    const LINE: u32 = 1;
    const LAYOUT: Layout = Layout {
        q: "b h s d",
        k: "b g d s",
        v: "b g s d",
    };
    const HEADS: HeadMap = HeadMap::Blocked;
}
impl Schedule<Ulysses> for Here {
    const NAME: &'static str = "m::here";
    fn forward(io: &mut impl Forward) -> Result<()> {
        for g in 0..io.groups() {
            io.send_qkv(g)?;
            io.wait_qkv(g)?;
            io.attend(g)?;
            io.send_out(g)?;
        }
        io.wait_out()
    }
    fn replay(io: &mut impl Forward) -> Result<()> {
        for g in 0..io.groups() {
            io.send_qkv(g)?;
            io.wait_qkv(g)?;
            io.send_out(g)?;
        }
        io.wait_out()
    }
    fn backward(io: &mut impl Backward) -> Result<()> {
        for g in 0..io.groups() {
            io.send_grad_out(g)?;
            io.wait_grad_out(g)?;
            io.attend_backward(g)?;
            io.send_grad_qkv(g)?;
        }
        io.wait_grad_qkv()
    }
}

fn noise(seed: u32, dims: &[usize]) -> Tensor {
    let count: usize = dims.iter().product();
    let values: Vec<f32> = (0..count)
        .map(|at| ((at as f32 + 1.0) * (0.37 + seed as f32) * 12.9898).sin() * 2.0)
        .collect();
    Tensor::from_vec(values, dims, &CPU).unwrap()
}

fn inputs() -> [Tensor; 3] {
    [1, 2, 3].map(|seed| noise(seed, &[BATCH, HEADS, LENGTH, WIDTH]))
}

/// Runs `body` on the scores of two ranks, and returns what one of them returns, or the error.
fn on_ranks<T: Send>(body: impl Fn(Scores, &Tensor) -> Result<T> + Sync) -> crate::Result<Vec<T>> {
    run_with(Settings::default().with_sp(2), |sp| {
        let shard = Shard::new(LENGTH, sp.sp_rank(), 2);
        let [q, k, v] = inputs().map(|x| {
            x.pad_with_zeros(2, 0, shard.padded - LENGTH)
                .unwrap()
                .narrow(2, shard.start, shard.len)
                .unwrap()
        });
        sp.scope(|| {
            let tokens = Tensor::zeros((1, shard.len), DType::U32, &CPU)?;
            sp.register_shard(tokens.id(), shard)?;
            rt::enter("m::forward", &[("tokens", &tokens, 1)])?;
            Ok::<_, Error>(body(scores::<Here>(&q, &k.t()?)?, &v)?)
        })
    })
}

fn same(lazy: impl Fn(Scores) -> Result<Scores> + Sync, eager: impl Fn(Tensor) -> Result<Tensor>) {
    let shards = on_ranks(|scores, v| softmax(&lazy(scores)?)?.matmul(v)).unwrap();
    let got = Tensor::cat(&shards, 2)
        .unwrap()
        .narrow(2, 0, LENGTH)
        .unwrap();
    let [q, k, v] = inputs();
    let scores = eager(q.matmul(&k.t().unwrap()).unwrap()).unwrap();
    let want = candle_nn::ops::softmax(&scores, D::Minus1)
        .unwrap()
        .matmul(&v)
        .unwrap();
    let flat = |x: &Tensor| x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (a, b) in flat(&got).into_iter().zip(flat(&want)) {
        assert!((a - b).abs() < 1e-5, "{a} against {b}");
    }
}

fn refused(lazy: impl Fn(Scores) -> Result<Scores> + Sync) -> String {
    on_ranks(|scores, _| lazy(scores).map(drop))
        .unwrap_err()
        .to_string()
}

fn later(i: usize, j: usize) -> u8 {
    u8::from(j > i)
}

fn mask() -> Mask {
    Mask::from_slice(&mask_rule(LENGTH, LENGTH, later), (LENGTH, LENGTH), &CPU).unwrap()
}

fn mask_tensor() -> Tensor {
    let values: Vec<u8> = (0..LENGTH * LENGTH)
        .map(|at| later(at / LENGTH, at % LENGTH))
        .collect();
    Tensor::from_vec(values, (LENGTH, LENGTH), &CPU).unwrap()
}

fn number(x: f32, dims: &[usize]) -> Tensor {
    Tensor::new(x, &CPU).unwrap().broadcast_as(dims).unwrap()
}

/// As candle's models write it, for tensors and for scores.
macro_rules! masked_fill {
    ($on_false:expr, $mask:expr, $on_true:expr) => {{
        let shape = $mask.shape();
        let on_true = Tensor::new($on_true, $on_false.device())?.broadcast_as(shape.dims())?;
        $mask.where_cond(&on_true, &$on_false)
    }};
}

#[test]
fn scale_cap_and_fill_in_the_forms_of_candle() {
    same(
        |s| {
            let s = (s / 2.5)?.to_dtype(DType::F32)?;
            let s = ((s / 3.0)?.tanh()? * 3.0)?;
            let mask = mask().broadcast_as(s.shape())?;
            masked_fill!(s, mask, f32::NEG_INFINITY)
        },
        |s| {
            let s = ((((s / 2.5)? / 3.0)?).tanh()? * 3.0)?;
            let mask = mask_tensor().broadcast_as(s.shape())?;
            masked_fill!(s, mask, f32::NEG_INFINITY)
        },
    );
    same(|s| 0.3 * &s, |s| s * 0.3);
    same(|s| s.affine(0.3, 0.0), |s| s * 0.3);
    same(
        |s| s.broadcast_div(&Tensor::new(&[4f32], &CPU)?),
        |s| s / 4.0,
    );
    same(
        |s| s.broadcast_mul(&Tensor::new(0.25f32, &CPU)?),
        |s| s / 4.0,
    );
}

#[test]
fn the_fill_may_be_on_either_side() {
    let keep = |dims: &[usize]| mask_tensor().eq(0u8).unwrap().broadcast_as(dims).unwrap();
    same(
        |s| {
            let host = mask_rule(LENGTH, LENGTH, |i, j| u32::from(j <= i));
            let mask =
                Mask::from_vec(host, (1, 1, LENGTH, LENGTH), s.device())?.expand(s.dims())?;
            mask.where_cond(&s, &number(-1e9, s.dims()))
        },
        |s| keep(s.dims()).where_cond(&s, &number(-1e9, s.dims())),
    );
}

#[test]
fn masks_are_added_in_every_form() {
    let float = || {
        let host = mask_rule(LENGTH, LENGTH, |i, j| {
            if j > i {
                f32::NEG_INFINITY
            } else {
                -0.1 * (i - j) as f32
            }
        });
        Mask::from_slice(&host, (LENGTH, LENGTH), &CPU).unwrap()
    };
    let tensor = || {
        let value = |i: usize, j: usize| {
            if j > i {
                f32::NEG_INFINITY
            } else {
                -0.1 * (i - j) as f32
            }
        };
        let values: Vec<f32> = (0..LENGTH * LENGTH)
            .map(|at| value(at / LENGTH, at % LENGTH))
            .collect();
        Tensor::from_vec(values, (LENGTH, LENGTH), &CPU).unwrap()
    };
    let eager = |s: Tensor| s.broadcast_add(&tensor());
    same(|s| s.broadcast_add(&float()), eager);
    same(|s| &s + &float(), eager);
    same(|s| s + float(), eager);
    same(|s| (s / 1.0) + &float(), eager);
    same(|s| &float() + s, eager);
    same(|s| s.broadcast_add(&tensor()), eager);
}

#[test]
fn dense_masks_depend_on_row_and_head() {
    for dims in [
        [BATCH, 1, 1, LENGTH],
        [1, HEADS, LENGTH, LENGTH],
        [BATCH, HEADS, LENGTH, LENGTH],
        [BATCH, 1, LENGTH, LENGTH],
    ] {
        same(
            |s| s.broadcast_add(&Mask::dense(&noise(7, &dims))?),
            |s| s.broadcast_add(&noise(7, &dims)),
        );
    }
    // Broadcast before it became a mask: nothing is stored twice, and the values are the same.
    let wide = |x: &Tensor| x.broadcast_as((BATCH, HEADS, LENGTH, LENGTH)).unwrap();
    let bias = noise(9, &[HEADS, 1, LENGTH]);
    same(
        |s| s.broadcast_add(&wide(&bias)),
        |s| s.broadcast_add(&wide(&bias)),
    );
}

#[test]
fn a_factor_may_follow_a_fill_with_minus_infinity() {
    same(
        |s| {
            let mask = mask().broadcast_as(s.shape())?;
            masked_fill!(s, mask, f32::NEG_INFINITY)? * 0.4
        },
        |s| {
            let mask = mask_tensor().broadcast_as(s.shape())?;
            masked_fill!(s, mask, f32::NEG_INFINITY)? * 0.4
        },
    );
}

#[test]
fn what_has_no_exact_form_is_refused_in_words() {
    let filled = |s: &Scores, fill: f32| {
        let mask = mask().broadcast_as(s.shape())?;
        masked_fill!(s.clone(), mask, fill)
    };
    for (text, why, code) in [
        (
            refused(|s| filled(&s, -1e9)? * 2.0),
            "the factor 2 after a mask",
            "AS0324",
        ),
        (
            refused(|s| filled(&s, f32::NEG_INFINITY)? * -1.0),
            "the factor -1 after a mask",
            "AS0324",
        ),
        (
            refused(|s| filled(&s, -1e9)?.tanh()),
            "tanh after a mask",
            "AS0324",
        ),
        (refused(|s| s.tanh()?.tanh()), "second tanh", "AS0324"),
        (
            refused(|s| s.affine(1.0, 0.5)),
            "no summand on the scores, found 0.5",
            "AS0324",
        ),
        (
            refused(|s| mask().where_cond(&noise(1, &[LENGTH, LENGTH]), &s)),
            "expected one number",
            "AS0330",
        ),
        (
            refused(|s| s + mask()),
            "expected a float mask, found U8",
            "AS0325",
        ),
        (
            refused(|s| s.broadcast_add(&noise(1, &[4, 4]))),
            "broadcasts to the scores",
            "AS0325",
        ),
    ] {
        assert!(
            text.contains(why)
                && text.contains(code)
                && text.contains(if code == "AS0324" { "m::here" } else { "" }),
            "{text}"
        );
    }
}

#[test]
fn sizes_are_global_and_types_are_what_the_model_asked_for() {
    on_ranks(|s, v| {
        assert_eq!(s.dims(), [BATCH, HEADS, LENGTH, LENGTH]);
        assert_eq!(s.dims4()?, (BATCH, HEADS, LENGTH, LENGTH));
        assert_eq!(
            (s.dim(D::Minus1)?, s.rank(), s.dtype()),
            (LENGTH, 4, DType::F32)
        );
        let weights = softmax(&s.to_dtype(DType::F64)?.contiguous()?)?;
        assert_eq!((weights.dtype(), weights.dims()), (DType::F64, s.dims()));
        // Values of a wider type make the site compute in it.
        let out = weights
            .to_dtype(DType::F64)?
            .matmul(&v.to_dtype(DType::F64)?)?;
        assert_eq!(out.dtype(), DType::F64);
        Ok(())
    })
    .unwrap();
}

mod merged;
