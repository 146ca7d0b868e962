//! `ZeRO` stage 2: what is divided, and when.

use autosp_plan::Settings;
use autosp_plan::settings::{Policy, Zero};
use candle_core::{DType, Device, Module};
use candle_nn::Linear;
use proptest::prelude::*;

use super::*;
use crate::memory::checkpoint;
use crate::random::Stream;
use crate::{Purpose, run_with};

const WIDTH: usize = 8;

/// The elements of a layer.
const LAYER: u64 = (WIDTH * WIDTH + WIDTH) as u64;

/// Layers of which each block runs some, so that blocks may share them.
struct Chain {
    layers: Vec<Linear>,
    /// The layers of each block.
    blocks: Vec<Vec<usize>>,
    /// Layers that run after the blocks.
    outside: Vec<usize>,
}

impl Chain {
    fn new(parameters: &Parameters, blocks: &[Vec<usize>], outside: &[usize]) -> Result<Self> {
        let count = blocks
            .iter()
            .flatten()
            .chain(outside)
            .max()
            .map_or(0, |most| most + 1);
        let layer = |i: usize| {
            let vb = parameters.builder().pp(format!("layers.{i}"));
            candle_nn::linear(WIDTH, WIDTH, vb)
        };
        Ok(Self {
            layers: (0..count).map(layer).collect::<candle_core::Result<_>>()?,
            blocks: blocks.to_vec(),
            outside: outside.to_vec(),
        })
    }

    /// Blocks for which `runs` is false are passed over.
    fn loss(&self, x: &Tensor, runs: impl Fn(usize) -> bool) -> candle_core::Result<Tensor> {
        let mut x = x.clone();
        for (i, block) in self.blocks.iter().enumerate() {
            let layers: Vec<Linear> = block.iter().map(|&at| self.layers[at].clone()).collect();
            let runs = runs(i);
            x = checkpoint(&x, move |x| {
                let mut x = x.clone();
                for layer in layers.iter().filter(|_| runs) {
                    x = (layer.forward(&x)?.tanh()? + x)?;
                }
                x + 0.0
            })?;
        }
        for &at in &self.outside {
            x = (self.layers[at].forward(&x)? + x)?;
        }
        x.sqr()?.mean_all()
    }
}

fn rows(sp: &Sp, step: usize) -> Result<Tensor> {
    let stream = Stream::new((10 * step + sp.rank()) as u64, "rows");
    let values: Vec<f32> = (0..4 * WIDTH)
        .map(|i| stream.normal(i as u64) as f32)
        .collect();
    Ok(Tensor::from_vec(values, (4, WIDTH), &Device::Cpu)?)
}

/// What four steps leave: norms of the gradients, variables, and the most bytes of gradients.
type Left = (Vec<f64>, Vec<Vec<f32>>, u64);

fn train(
    settings: Settings,
    bucket_bytes: usize,
    blocks: &[Vec<usize>],
    outside: &[usize],
    runs: impl Fn(usize, usize, usize) -> bool + Sync,
) -> Result<Vec<Left>> {
    run_with(settings, |sp| {
        let parameters = Parameters::init(1, DType::F32, &Device::Cpu);
        let model = Chain::new(&parameters, blocks, outside)?;
        let how = TrainSettings {
            optimizer: Optimizer::sgd(),
            schedule: Schedule::constant(0.1),
            bucket_bytes,
            ..TrainSettings::default()
        };
        let mut trainer = Trainer::new(sp, parameters, how)?;
        let mut norms = Vec::new();
        for step in 0..4 {
            let x = rows(sp, step)?;
            let report = trainer.step(|| model.loss(&x, |block| runs(step, sp.rank(), block)))?;
            norms.push(report.grad_norm);
        }
        let values = trainer.parameters().vars().into_iter();
        let values = values.map(|var| var.flatten_all()?.to_vec1::<f32>());
        let values = values.collect::<candle_core::Result<_>>()?;
        let most = sp.ledger().most(Purpose::Gradients);
        Ok((norms, values, most))
    })
}

fn same(a: &Left, b: &Left) -> bool {
    let values = |left: &Left| left.1.iter().flatten().copied().collect::<Vec<f32>>();
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * b.abs() + 1e-7;
    a.0.iter().zip(&b.0).all(|(a, b)| near(*a, *b))
        && values(a)
            .iter()
            .zip(values(b))
            .all(|(a, b)| near(f64::from(*a), f64::from(b)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    /// Whatever blocks share with each other and with what is outside, and whatever ranks leave out in some step, no number changes.
    #[test]
    fn sharing_and_leaving_out_change_nothing(
        blocks in prop::collection::vec(prop::collection::vec(0usize..4, 0..3), 1..5), outside in prop::collection::vec(0usize..4, 0..2),
        ranks in 1usize..4, bucket in prop::sample::select(vec![1usize, 400, 1 << 20]), left_out in any::<u32>(),
        policy in prop::sample::select(vec![Policy::Attention, Policy::Input]),
    ) {
        let settings = Settings::default().with_dp(ranks).with_policy(policy);
        let mut blocks = blocks;
        // Every layer has a gradient somewhere.
        blocks.push(vec![0, 1, 2, 3]);
        let last = blocks.len() - 1;
        let runs = |step: usize, rank: usize, block: usize| {
            block == last && rank == 0 || left_out >> ((7 * step + 3 * rank + block) % 32) & 1 == 0
        };
        let whole = train(settings.clone(), bucket, &blocks, &outside, runs).unwrap();
        let divided = train(settings.with_zero(Zero::Stage2), bucket, &blocks, &outside, runs).unwrap();
        for (divided, whole) in divided.iter().zip(&whole) {
            prop_assert!(same(divided, whole), "{:?} {:?}", divided.0, whole.0);
        }
    }
}

#[test]
fn no_rank_holds_all_gradients() {
    let blocks: Vec<Vec<usize>> = (0..12).map(|i| vec![i]).collect();
    for (ranks, bucket) in [(2, 1), (4, 1), (4, 300)] {
        let settings = Settings::default()
            .with_dp(ranks)
            .with_policy(Policy::Input)
            .with_zero(Zero::Stage2);
        for (_, _, most) in train(settings, bucket, &blocks, &[], |_, _, _| true).unwrap() {
            let share = 4 * 12 * LAYER / ranks as u64;
            // One block, and buckets that wait for a second one; in the order of names layer 10 comes before layer 2.
            let waiting = if bucket > 1 { 3 } else { 1 };
            let allowed = share + waiting * 4 * LAYER + 4 * 24;
            assert!(
                most > 0 && most <= allowed,
                "{most} of {allowed}, {ranks} ranks"
            );
            assert!(most < 4 * 12 * LAYER);
        }
    }
}

#[test]
fn a_variable_without_a_gradient_is_named() {
    let blocks = [vec![0], vec![1], vec![2]];
    let settings = Settings::default()
        .with_dp(2)
        .with_policy(Policy::Input)
        .with_zero(Zero::Stage2);
    // From the second step on no rank runs block 1, whose buckets are reduced all the same.
    let runs = |step: usize, _: usize, block: usize| step == 0 || block != 1;
    let error = train(settings, 1, &blocks, &[], runs).unwrap_err();
    assert_eq!(error.code(), codes::NO_GRADIENT);
    assert!(error.message().contains("layers.1.weight"), "{error}");
}
