//! bf16 and f16 go through f32.

use candle_core::{DType, Tensor};

use super::{Case, MaskCase, close, long, values};

#[test]
fn half_precision_is_close_to_the_same_inputs_in_f32() {
    for dtype in [DType::BF16, DType::F16] {
        let case = Case {
            len: 130,
            valid: 130,
            d: 32,
            dv: 32,
            dtype,
            ..long(MaskCase::Fill(None, Some(0), f64::NEG_INFINITY, true))
        };
        let (got, got_grads) = case.fast(&case.inputs());
        let wide = Case {
            dtype: DType::F32,
            ..case.clone()
        };
        let (want, want_grads) = wide.fast(&case.inputs().map(|x| x.to_dtype(DType::F32).unwrap()));
        assert_eq!(got.o.dtype(), dtype);
        assert_eq!(got.lse.dtype(), DType::F32);
        close("o", &got.o, &want.o, 4e-3);
        close("dq", &got_grads.q, &want_grads.q, 8e-3);
        close("dk", &got_grads.k, &want_grads.k, 8e-3);
        close("dv", &got_grads.v, &want_grads.v, 8e-3);
    }
}

/// The error of half precision against f64 is at most twice that of candle's slow operations in the same type.
#[test]
fn half_precision_is_as_good_as_one_device() {
    let mask = MaskCase::Fill(None, Some(0), f64::NEG_INFINITY, true);
    let half = Case {
        len: 200,
        valid: 200,
        d: 32,
        dv: 32,
        dtype: DType::BF16,
        ..long(mask)
    };
    let exact = Case {
        dtype: DType::F64,
        ..half.clone()
    };
    let inputs = half.inputs();
    let (o, grads) = half.fast(&inputs);
    let (slow_o, slow_grads) = half.slow(&inputs);
    let (exact_o, exact_grads) = exact.slow(&inputs.map(|x| x.to_dtype(DType::F64).unwrap()));
    let distance = |a: &Tensor, b: &Tensor| {
        let pairs = values(a).into_iter().zip(values(b));
        pairs.map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
    };
    let fast = [o.o, grads.q, grads.k, grads.v];
    let [dq, dk, dv] = &slow_grads;
    let [exact_dq, exact_dk, exact_dv] = &exact_grads;
    let slow = [
        (&slow_o, &exact_o),
        (dq, exact_dq),
        (dk, exact_dk),
        (dv, exact_dv),
    ];
    for (fast, (slow, exact)) in fast.iter().zip(slow) {
        let (ours, theirs) = (distance(fast, exact), distance(slow, exact));
        assert!(ours <= 2.0 * theirs, "{ours} against {theirs}");
    }
}
