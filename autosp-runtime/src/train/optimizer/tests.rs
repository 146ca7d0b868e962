use candle_core::Var;

use super::*;

/// Two variables, of shapes [2, 2] and [3].
fn vars(dtype: DType) -> Vec<Var> {
    let make = |data: &[f64], shape: &[usize]| {
        Var::from_tensor(
            &Tensor::from_slice(data, shape, &Device::Cpu)
                .unwrap()
                .to_dtype(dtype)
                .unwrap(),
        )
        .unwrap()
    };
    vec![
        make(&[0.5, -1.25, 2.0, 0.03125], &[2, 2]),
        make(&[1.0, -0.75, 0.25], &[3]),
    ]
}

/// The gradient of step `t` at element `i`: no two alike, and one that is always zero.
fn gradient(t: usize, i: usize) -> f64 {
    if i == 5 {
        0.0
    } else {
        ((t * 7 + i * 3) % 11) as f64 / 8.0 - 0.6
    }
}

/// One step on whole variables.
fn update(
    updater: &mut Updater,
    rate: f64,
    scale: f64,
    decay: f64,
    vars: &[Var],
    grads: &[Tensor],
) {
    let manner = Manner {
        rate: 1.0,
        weight_decay: decay,
    };
    let step = updater.begin(rate, scale);
    for (slot, (var, grad)) in vars.iter().zip(grads).enumerate() {
        let value = updater.update(slot, step, manner, var, grad).unwrap();
        var.set(&value.reshape(var.shape()).unwrap()).unwrap();
    }
}

fn run(rule: Optimizer, dtype: DType, steps: usize) -> Vec<f64> {
    let vars = vars(dtype);
    let mut updater = Updater::new(rule, vars.iter().map(|var| var.dtype()));
    let (Optimizer::AdamW { weight_decay, .. } | Optimizer::Sgd { weight_decay, .. }) = rule;
    for t in 0..steps {
        let grad = |first: usize, var: &Var| {
            let data: Vec<f64> = (first..first + var.elem_count())
                .map(|i| gradient(t, i))
                .collect();
            Tensor::from_vec(data, var.shape(), &Device::Cpu)
                .unwrap()
                .to_dtype(DType::F32)
                .unwrap()
        };
        let grads = [grad(0, &vars[0]), grad(4, &vars[1])];
        update(&mut updater, 0.02, 0.5, weight_decay, &vars, &grads);
    }
    vars.iter()
        .flat_map(|var| read::<f64>(var).unwrap())
        .collect()
}

/// The definition, element by element in f64: first the decay, then the corrected moments.
fn adamw(steps: usize) -> Vec<f64> {
    let start: Vec<f64> = vars(DType::F64)
        .iter()
        .flat_map(|var| read::<f64>(var).unwrap())
        .collect();
    let one = |(i, mut x): (usize, f64)| {
        let (mut m, mut v) = (0.0, 0.0);
        for t in 1..=steps {
            let g = 0.5 * gradient(t - 1, i);
            x -= 0.02 * 0.1 * x;
            m = 0.9 * m + 0.1 * g;
            v = 0.99 * v + 0.01 * g * g;
            let corrected = m / (1.0 - 0.9_f64.powi(t as i32));
            x -= 0.02 * corrected / ((v / (1.0 - 0.99_f64.powi(t as i32))).sqrt() + 1e-8);
        }
        x
    };
    start.into_iter().enumerate().map(one).collect()
}

fn sgd(steps: usize, momentum: f64, decay: f64) -> Vec<f64> {
    let start: Vec<f64> = vars(DType::F64)
        .iter()
        .flat_map(|var| read::<f64>(var).unwrap())
        .collect();
    let one = |(i, mut x): (usize, f64)| {
        let mut buffer = 0.0;
        for t in 0..steps {
            buffer = momentum * buffer + 0.5 * gradient(t, i) + decay * x;
            x -= 0.02 * buffer;
        }
        x
    };
    start.into_iter().enumerate().map(one).collect()
}

fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            (found - expected).abs() <= tolerance * (1.0 + expected.abs()),
            "{found} {expected}"
        );
    }
}

const ADAMW: Optimizer = Optimizer::AdamW {
    beta1: 0.9,
    beta2: 0.99,
    eps: 1e-8,
    weight_decay: 0.1,
};

#[test]
fn adamw_is_its_definition() {
    for steps in [1, 2, 20] {
        assert_close(&run(ADAMW, DType::F32, steps), &adamw(steps), 1e-6);
        assert_close(&run(ADAMW, DType::F64, steps), &adamw(steps), 1e-7);
    }
}

#[test]
fn sgd_is_its_definition() {
    for (momentum, weight_decay) in [(0.0, 0.0), (0.0, 0.1), (0.9, 0.0), (0.9, 0.1)] {
        let found = run(
            Optimizer::Sgd {
                momentum,
                weight_decay,
            },
            DType::F32,
            10,
        );
        assert_close(&found, &sgd(10, momentum, weight_decay), 1e-6);
    }
}

#[test]
fn half_precision_variables_have_a_master_copy() {
    // Steps of 1e-6 vanish in bf16 one by one, but not together.
    let var = Var::from_tensor(&Tensor::ones(1, DType::BF16, &Device::Cpu).unwrap()).unwrap();
    let grad = Tensor::ones(1, DType::F32, &Device::Cpu).unwrap();
    let mut updater = Updater::new(Optimizer::sgd(), [DType::BF16].into_iter());
    for _ in 0..100 {
        let (vars, grads) = (std::slice::from_ref(&var), std::slice::from_ref(&grad));
        update(&mut updater, 1e-4, 1.0, 0.0, vars, grads);
    }
    let value = read::<f64>(&var).unwrap()[0];
    assert!((value - 0.99).abs() < 0.005, "{value}");
    let found = run(ADAMW, DType::BF16, 20);
    assert_close(&found, &adamw(20), 4e-3);
}
