//! Masks look like candle's tensors, and bands are compared with the rule that they were taken for.

use candle_core::{D, DType, Device, Tensor};
use proptest::prelude::*;

use super::{Action, Band, Block, Mask, Prepared, Term, mask_rule};

const CPU: Device = Device::Cpu;

fn causal(n: usize) -> Mask {
    let host = mask_rule(n, n, |i, j| u8::from(j > i)).band(
        Band {
            lo: None,
            hi: Some(0),
        },
        0,
        1,
    );
    Mask::from_slice(&host, (n, n), &CPU).unwrap()
}

/// The mask as a tensor, through the same methods as the term.
fn values(mask: &Mask, action: Action, n: usize) -> Vec<f64> {
    let term = Term::new(mask, action, 1, 1, n).unwrap();
    let block = Block {
        batch: 0,
        head: 0,
        queries: 0..n,
        keys: 0..n,
    };
    let mut scores = vec![0.0f64; n * n];
    Prepared::new(&[term], &block, 0.0).apply(&block, &mut scores, n);
    (0..n * n).map(|at| scores[at % n * n + at / n]).collect()
}

#[test]
fn sizes_change_as_those_of_a_tensor() {
    let (mask, tensor) = (causal(5), Tensor::zeros((5, 5), DType::U8, &CPU).unwrap());
    let masks = [
        mask.unsqueeze(0).unwrap(),
        mask.broadcast_as((2, 3, 5, 5)).unwrap(),
        mask.expand((3, 5, 5)).unwrap(),
    ];
    let tensors = [
        tensor.unsqueeze(0).unwrap(),
        tensor.broadcast_as((2, 3, 5, 5)).unwrap(),
        tensor.expand((3, 5, 5)).unwrap(),
    ];
    for (mask, tensor) in masks.iter().zip(&tensors) {
        assert_eq!(
            (mask.shape(), mask.dims(), mask.rank()),
            (tensor.shape(), tensor.dims(), tensor.rank())
        );
    }
    assert_eq!(mask.dims2().unwrap(), (5, 5));
    assert_eq!(masks[1].dims4().unwrap(), (2, 3, 5, 5));
    assert_eq!(masks[2].dims3().unwrap(), (3, 5, 5));
    assert_eq!(mask.dim(D::Minus1).unwrap(), 5);
    assert_eq!(
        mask.to_dtype(DType::F32)
            .unwrap()
            .contiguous()
            .unwrap()
            .dtype(),
        DType::F32
    );
    assert!(mask.broadcast_as((5, 6)).is_err() && mask.broadcast_as(5).is_err());
    let refused =
        |result: candle_core::Result<Mask>| crate::Error::from(result.unwrap_err()).code().id;
    assert_eq!(mask.unsqueeze(1).unwrap().dims(), [5, 1, 5]);
    let wide = mask.broadcast_left((2, 1)).unwrap();
    assert_eq!(wide.dims(), [2, 1, 5, 5]);
    assert_eq!(wide.squeeze(1).unwrap().dims(), [2, 5, 5]);
    assert_eq!(mask.reshape((1, 1, 5, 5)).unwrap().dims(), [1, 1, 5, 5]);
    assert_eq!(refused(mask.unsqueeze(2)), "AS0325");
    assert_eq!(refused(mask.reshape((25, 1))), "AS0325");
    let host = mask_rule(4, 4, |_, _| 0u8);
    assert_eq!(refused(Mask::from_slice(&host, (2, 8), &CPU)), "AS0325");
    assert!(Mask::from_slice(&host, (4, 5), &CPU).is_err());
    assert_eq!(
        Mask::from_vec(host, (1, 1, 4, 4), &CPU).unwrap().dims(),
        [1, 1, 4, 4]
    );
}

#[test]
fn values_change_as_those_of_a_tensor() {
    let n = 6;
    let rule = |i: usize, j: usize| (i as f32 - 2.3 * j as f32) / 7.0;
    let mask = Mask::from_slice(&mask_rule(n, n, rule), (n, n), &CPU).unwrap();
    let all: Vec<f32> = (0..n * n).map(|at| rule(at / n, at % n)).collect();
    let tensor = Tensor::from_vec(all, (n, n), &CPU).unwrap();
    let same = |mask: candle_core::Result<Mask>, tensor: candle_core::Result<Tensor>| {
        let tensor = tensor.unwrap();
        assert_eq!(mask.as_ref().unwrap().dtype(), tensor.dtype());
        let want: Vec<f64> = tensor
            .to_dtype(DType::F64)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        assert_eq!(values(&mask.unwrap(), Action::Add, n), want);
    };
    same(mask.to_dtype(DType::BF16), tensor.to_dtype(DType::BF16));
    same(mask.to_dtype(DType::F16), tensor.to_dtype(DType::F16));
    same(&mask * 2.0, &tensor * 2.0);
    same(&mask - 1.0, &tensor - 1.0);
    let negative = |x: &Mask| (1.0 - x).unwrap() * -4.0;
    same(negative(&mask), (1.0 - &tensor).unwrap() * -4.0);

    let select = Tensor::from_vec(
        (0..n * n)
            .map(|at| u8::from(at % n > at / n))
            .collect::<Vec<_>>(),
        (n, n),
        &CPU,
    )
    .unwrap();
    let number = |x: f32| Tensor::new(x, &CPU).unwrap().broadcast_as((n, n)).unwrap();
    let (low, zero) = (number(f32::NEG_INFINITY), number(0.0));
    same(
        causal(n).where_cond(&low, &zero),
        select.where_cond(&low, &zero),
    );
    same(causal(n).to_dtype(DType::F32), select.to_dtype(DType::F32));
    same(Mask::dense(&tensor), Ok(tensor.clone()));
}

#[test]
fn a_band_that_differs_from_its_rule_is_found() {
    let check = |rows: usize, band: Band, rule: fn(usize, usize) -> u8| {
        let host = mask_rule(rows, rows, rule).band(band, 0, 1);
        Mask::from_slice(&host, (rows, rows), &CPU)
            .map_err(|error| crate::Error::from(error).to_string())
    };
    let causal = Band {
        lo: None,
        hi: Some(0),
    };
    check(700, causal, |i, j| u8::from(j > i)).unwrap();
    check(
        700,
        Band {
            lo: Some(-99),
            hi: Some(0),
        },
        |i, j| u8::from(j > i || j + 99 < i),
    )
    .unwrap();
    let text = check(700, causal, |i, j| u8::from(j >= i)).unwrap_err();
    assert!(
        text.contains("at query 0, key 0 expected 0, found 1") && text.contains("AS0326"),
        "{text}"
    );
    check(700, causal, |i, j| u8::from(j > i || j + 300 < i)).unwrap_err();
    check(
        700,
        Band {
            lo: Some(-99),
            hi: Some(0),
        },
        |i, j| u8::from(j > i || j + 100 < i),
    )
    .unwrap_err();
    check(700, causal, |i, j| 2 * u8::from(j > i)).unwrap_err();
}

#[test]
fn masks_that_do_not_fit_the_scores_are_refused() {
    let fill = Action::Fill {
        value: 0.0,
        nonzero: true,
    };
    let code = |mask: &Mask, action| {
        Term::new(mask, action, 2, 4, 6)
            .map(drop)
            .unwrap_err()
            .code()
            .id
    };
    assert_eq!(code(&causal(6), Action::Add), "AS0325");
    assert_eq!(
        code(&causal(6).to_dtype(DType::F32).unwrap(), fill),
        "AS0325"
    );
    assert_eq!(code(&causal(5), fill), "AS0325");
    assert_eq!(
        code(&causal(6).broadcast_as((3, 1, 6, 6)).unwrap(), fill),
        "AS0325"
    );
    let dense = |dims: &[usize]| Mask::dense(&Tensor::zeros(dims, DType::F32, &CPU).unwrap());
    for dims in [
        vec![6, 6],
        vec![1, 6],
        vec![2, 1, 1, 6],
        vec![2, 4, 6, 6],
        vec![4, 6, 6],
    ] {
        Term::new(&dense(&dims).unwrap(), Action::Add, 2, 4, 6).unwrap();
    }
    assert_eq!(code(&dense(&[3, 1, 6, 6]).unwrap(), Action::Add), "AS0325");
    let large = Tensor::zeros(1, DType::U8, &CPU)
        .unwrap()
        .broadcast_as((5000, 5000))
        .unwrap();
    assert_eq!(
        crate::Error::from(Mask::dense(&large).unwrap_err())
            .code()
            .id,
        "AS0327"
    );
    let tracked = candle_core::Var::zeros((6, 6), DType::F32, &CPU).unwrap();
    assert_eq!(
        crate::Error::from(Mask::dense(&tracked).unwrap_err())
            .code()
            .id,
        "AS0325"
    );
}

proptest! {
    #[test]
    fn bands_of_blocks_are_those_of_their_pairs(
        lo in proptest::option::of(-9i64..9), hi in proptest::option::of(-9i64..9),
        i in 0usize..12, rows in 1usize..9, j in 0usize..12, cols in 1usize..9,
    ) {
        let (band, queries, keys) = (Band { lo, hi }, i..i + rows, j..j + cols);
        let pairs: Vec<bool> = keys.clone().flat_map(|j| queries.clone().map(move |i| band.contains(i, j))).collect();
        match band.covers(&queries, &keys) {
            Some(inside) => prop_assert!(pairs.iter().all(|visible| *visible == inside)),
            None => prop_assert!(pairs.len() > 1),
        }
        for j in keys {
            let visible = band.queries(j, &queries);
            for i in queries.clone() {
                prop_assert_eq!(visible.contains(&i), band.contains(i, j));
            }
        }
    }
}

#[test]
fn a_band_is_what_a_term_leaves_visible() {
    let term = |declared: Band, values: (u8, u8), action: Action| {
        let (inside, outside) = values;
        let rule = mask_rule(6, 6, move |i, j| {
            if declared.contains(i, j) {
                inside
            } else {
                outside
            }
        });
        let host = rule.band(declared, inside, outside);
        let mask = Mask::from_slice(&host, (6, 6), &Device::Cpu).unwrap();
        Term::new(&mask, action, 1, 1, 6).unwrap()
    };
    let fill = |value: f64| Action::Fill {
        value,
        nonzero: true,
    };
    let causal = Band {
        lo: None,
        hi: Some(0),
    };
    let future = Band {
        lo: Some(1),
        hi: None,
    };
    let window = Band {
        lo: Some(-2),
        hi: Some(0),
    };
    assert_eq!(
        term(causal, (0, 1), fill(f64::NEG_INFINITY)).visible_band(),
        Some(causal)
    );
    // The same mask, declared by what it hides.
    assert_eq!(
        term(future, (1, 0), fill(-1e9)).visible_band(),
        Some(causal)
    );
    assert_eq!(
        term(window, (0, 1), fill(-1e9)).visible_band(),
        Some(window)
    );
    // A fill that counts, a band that is hidden between two sides, a query that sees nothing, and what is hidden inside.
    assert_eq!(term(causal, (0, 1), fill(-100.0)).visible_band(), None);
    assert_eq!(term(window, (1, 0), fill(-1e9)).visible_band(), None);
    assert_eq!(
        term(
            Band {
                lo: None,
                hi: Some(-1)
            },
            (0, 1),
            fill(-1e9)
        )
        .visible_band(),
        None
    );
    assert_eq!(term(causal, (1, 0), fill(-1e9)).visible_band(), None);
}
