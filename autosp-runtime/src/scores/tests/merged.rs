//! Sites whose dims are merged: rows with heads, heads with queries, the sequence first.

use super::*;

/// A site with the schedule of [`Here`] and another layout.
macro_rules! site {
    ($name:ident, $q:literal, $k:literal, $v:literal) => {
        struct $name;
        impl Site for $name {
            const LINE: u32 = 1;
            const LAYOUT: Layout = Layout {
                q: $q,
                k: $k,
                v: $v,
            };
            const HEADS: HeadMap = HeadMap::Blocked;
        }
        impl Schedule<Ulysses> for $name {
            const NAME: &'static str = "m::merged";
            fn forward(io: &mut impl Forward) -> Result<()> {
                <Here as Schedule<Ulysses>>::forward(io)
            }
            fn replay(io: &mut impl Forward) -> Result<()> {
                <Here as Schedule<Ulysses>>::replay(io)
            }
            fn backward(io: &mut impl Backward) -> Result<()> {
                <Here as Schedule<Ulysses>>::backward(io)
            }
        }
    };
}

site!(Rows, "(b h) s d", "(b g) d s", "(b g) s d");
site!(Folded, "b (s h) d", "b d s", "b s d");

/// Loss and gradients of q, k and v of `model`, which gets q, k [b, h, s, d] and v [b, h, s, d] and gives [b, h, s, d].
fn outcome(
    heads: [usize; 3],
    model: impl Fn(&[Tensor; 3]) -> Result<Tensor>,
    part: impl Fn(&Tensor) -> Tensor,
) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
    let flat = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
    let vars = [0, 1, 2].map(|k| {
        let whole = noise(k as u32 + 1, &[BATCH, heads[k], LENGTH, WIDTH]);
        candle_core::Var::from_tensor(&part(&whole).contiguous().unwrap()).unwrap()
    });
    let inputs = vars.each_ref().map(|v| v.as_tensor().clone());
    let out = model(&inputs)?;
    let weights = part(&noise(4, &[BATCH, heads[0], LENGTH, WIDTH]));
    let grads = (&out * weights)?.sum_all()?.backward()?;
    let grads = vars
        .iter()
        .map(|v| flat(&grads.get(v).expect("a gradient").contiguous()?))
        .collect::<Result<Vec<_>>>()?;
    Ok((flat(&out.contiguous()?)?, grads))
}

/// The shards of two ranks are the parts of what one device computes, gradients too.
fn equal(
    heads: [usize; 3],
    lazy: impl Fn(&[Tensor; 3]) -> Result<Tensor> + Sync,
    eager: impl Fn(&[Tensor; 3]) -> Result<Tensor>,
) {
    // Padding is at the end of the last shard.
    let padded = LENGTH.div_ceil(2) * 2;
    let part = |rank: usize| {
        move |x: &Tensor| {
            x.pad_with_zeros(2, 0, padded - LENGTH)
                .unwrap()
                .narrow(2, rank * padded / 2, padded / 2)
                .unwrap()
        }
    };
    let found = run_with(Settings::default().with_sp(2), |sp| {
        let shard = Shard::new(LENGTH, sp.sp_rank(), 2);
        sp.scope(|| {
            let tokens = Tensor::zeros((BATCH, shard.len), DType::U32, &CPU)?;
            sp.register_shard(tokens.id(), shard)?;
            rt::enter("m::forward", &[("tokens", &tokens, 1)])?;
            rt::batch(&tokens, 0)?;
            Ok::<_, Error>(outcome(heads, &lazy, part(shard.rank))?)
        })
    })
    .unwrap();
    let (want, want_grads) = outcome(heads, eager, Tensor::clone).unwrap();
    let check = |whole: &[f32], heads: usize, pick: &dyn Fn(usize) -> Vec<f32>| {
        let whole = Tensor::from_slice(whole, (BATCH, heads, LENGTH, WIDTH), &CPU).unwrap();
        for rank in 0..2 {
            let want = part(rank)(&whole).flatten_all().unwrap();
            for (a, b) in pick(rank).iter().zip(want.to_vec1::<f32>().unwrap()) {
                assert!((a - b).abs() < 2e-5, "{a} against {b}");
            }
        }
    };
    check(&want, heads[0], &|rank| found[rank].0.clone());
    for (k, want) in want_grads.iter().enumerate() {
        check(want, heads[k], &|rank| found[rank].1[k].clone());
    }
}

fn repeated(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, g, s, d) = x.dims4()?;
    x.unsqueeze(2)?
        .expand((b, g, heads / g, s, d))?
        .reshape((b, heads, s, d))
}

fn causal(scores: &Tensor) -> Result<Tensor> {
    let mask = mask_tensor().broadcast_as(scores.shape())?;
    masked_fill!(scores, mask, f32::NEG_INFINITY)
}

/// What one device computes, in four dims.
fn plain(inputs: &[Tensor; 3]) -> Result<Tensor> {
    let [q, k, v] = inputs;
    let heads = q.dim(1)?;
    let scores = (q.matmul(&repeated(k, heads)?.t()?)? / 2.0)?;
    candle_nn::ops::softmax(&causal(&scores)?, D::Minus1)?.matmul(&repeated(v, heads)?)
}

#[test]
fn rows_merged_with_heads() {
    for kv in [4, 2, 1] {
        let merged = |x: &Tensor| x.flatten(0, 1);
        equal(
            [4, kv, kv],
            |[q, k, v]| {
                let dims = q.dims().to_vec();
                let s = (scores::<Rows>(&merged(q)?, &merged(k)?.t()?)? / 2.0)?;
                let lead = s.dim(0)?;
                assert_eq!(s.dims(), [BATCH * 4, LENGTH, LENGTH]);
                let s = s.reshape((BATCH, 4, LENGTH, LENGTH))?;
                let mask = mask().broadcast_left((BATCH, 4))?;
                let s = masked_fill!(s, mask, f32::NEG_INFINITY)?;
                let out = softmax(s)?
                    .reshape((lead, LENGTH, ()))?
                    .matmul(&merged(v)?)?;
                out.reshape(dims)
            },
            plain,
        );
    }
}

#[test]
fn heads_folded_into_the_queries() {
    equal(
        [4, 1, 1],
        |[q, k, v]| {
            let (b, h, len, d) = q.dims4()?;
            let q = q.transpose(1, 2)?.reshape((b, len * h, d))?;
            let s = (scores::<Folded>(&q, &k.squeeze(1)?.t()?)? / 2.0)?;
            assert_eq!(s.dims3()?, (b, LENGTH * h, LENGTH));
            let view = (b, LENGTH, h, LENGTH);
            let s = s.reshape(view)?;
            let mask = mask().unsqueeze(0)?.unsqueeze(2)?.broadcast_as(view)?;
            let s = masked_fill!(s, mask, f32::NEG_INFINITY)?;
            let out = softmax(s)?
                .reshape((b, LENGTH * h, LENGTH))?
                .matmul(&v.squeeze(1)?)?;
            out.reshape((b, len, h, d))?.transpose(1, 2)
        },
        plain,
    );
}

#[test]
fn a_bias_is_cut_by_head_whatever_the_dims() {
    let bias = noise(7, &[1, 4, 1, LENGTH]);
    let rows = bias.broadcast_as((BATCH, 4, 1, LENGTH)).unwrap();
    let rows = rows.reshape((BATCH * 4, 1, LENGTH)).unwrap();
    equal(
        [4, 4, 4],
        |[q, k, v]| {
            let merged = |x: &Tensor| x.flatten(0, 1);
            let s = scores::<Rows>(&merged(q)?, &merged(k)?.t()?)?.broadcast_add(&rows)?;
            softmax(s)?.matmul(&merged(v)?)?.reshape(q.dims())
        },
        |[q, k, v]| {
            let s = q.matmul(&k.t()?)?.broadcast_add(&bias)?;
            candle_nn::ops::softmax(&s, D::Minus1)?.matmul(v)
        },
    );
}

#[test]
fn a_mask_fills_itself() {
    // `masked_fill` of a mask's own numbers, as candle's falcon has it.
    same(
        |s| {
            let mask = mask().broadcast_as((BATCH, 1, LENGTH, LENGTH))?;
            let numbers = masked_fill!(mask.to_dtype(DType::F32)?, mask, -1e9)?;
            s.broadcast_add(&numbers)
        },
        |s| {
            let mask = mask_tensor().broadcast_as((BATCH, 1, LENGTH, LENGTH))?;
            let numbers = masked_fill!(mask.to_dtype(DType::F32)?, mask, -1e9f32)?;
            s.broadcast_add(&numbers)
        },
    );
    let other = refused(|s| {
        let (one, other) = (mask(), mask());
        let numbers = masked_fill!(one.to_dtype(DType::F32)?, other, -1e9f32)?;
        s.broadcast_add(&numbers)
    });
    assert!(other.contains("the same mask in another form"), "{other}");
}
