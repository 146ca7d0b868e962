//! Memory that runs out, and what the planner chooses.

use autosp_plan::Settings;
use autosp_plan::settings::{Place, Zero};
use candle_core::{DType, Device, Module};

use super::*;
use crate::memory::checkpoint;
use crate::run_with;

const WIDTH: usize = 8;

/// A stack of four blocks, on a batch of some rows.
struct Stack(Vec<candle_nn::Linear>);

impl Stack {
    fn new(parameters: &Parameters) -> Result<Self> {
        let block = |i: usize| candle_nn::linear(WIDTH, WIDTH, parameters.builder().pp(i));
        Ok(Self((0..4).map(block).collect::<candle_core::Result<_>>()?))
    }

    fn loss(&self, rows: usize) -> candle_core::Result<Tensor> {
        let mut x = Tensor::ones((rows, WIDTH), DType::F32, &Device::Cpu)?;
        for block in &self.0 {
            let block = block.clone();
            x = checkpoint(&x, move |x| block.forward(x)?.silu())?;
        }
        x.sqr()?.mean_all()
    }
}

fn values(trainer: &Trainer) -> Vec<Vec<f32>> {
    let vars = trainer.parameters().vars().into_iter();
    vars.map(|var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        .collect()
}

/// Bytes of the weights and biases of [`Stack`].
const PARAMETERS: u64 = 4 * (WIDTH * WIDTH + WIDTH) as u64 * 4;

#[test]
fn a_step_beyond_the_limit_names_what_was_wanted_and_changes_nothing() {
    let folder = std::env::temp_dir().join(format!("autosp-limit-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    // Parameters, gradients and AdamW's moments, and something for blocks.
    let room = 4 * PARAMETERS + 4000;
    let settings = Settings::default()
        .with_dp(2)
        .with_memory_limit(room)
        .with("policy", "input")
        .unwrap();
    run_with(settings, |sp| {
        let parameters = Parameters::init(1, DType::F32, &Device::Cpu);
        let stack = Stack::new(&parameters)?;
        let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
        trainer.step(|| stack.loss(4))?;
        let before = values(&trainer);
        let error = trainer.step(|| stack.loss(4000)).unwrap_err();
        assert_eq!(error.code(), codes::OUT_OF_MEMORY);
        let (message, limit) = (error.message(), autosp_plan::units::show_size(room));
        assert!(
            message.starts_with("memory for what the forward keeps: "),
            "{error}"
        );
        assert!(
            message.contains(&limit) && message.contains("parameters"),
            "{error}"
        );
        assert_eq!(error.help(), Some("AUTOSP_POLICY=input+offload"));
        assert_eq!((values(&trainer), trainer.steps()), (before, 1));
        // What is there can be saved, and smaller steps go on.
        trainer.save_checkpoint(&folder, "")?;
        trainer.step(|| stack.loss(4))?;
        assert_ne!(values(&trainer), Vec::<Vec<f32>>::new());
        assert_eq!(trainer.steps(), 2);
        Ok(())
    })
    .unwrap();
    let _ = std::fs::remove_dir_all(&folder);
}

#[test]
fn each_purpose_has_its_limit() {
    let fails = |room: u64, settings: Settings| {
        let done = run_with(settings.with_memory_limit(room), |sp| {
            let parameters = Parameters::init(1, DType::F32, &Device::Cpu);
            let stack = Stack::new(&parameters)?;
            let before = stack.0[0].weight().to_vec2::<f32>()?;
            // A bucket for each variable.
            let how = TrainSettings {
                bucket_bytes: 1,
                ..TrainSettings::default()
            };
            let mut trainer = Trainer::new(sp, parameters, how)?;
            let step = trainer.step(|| stack.loss(4));
            if step.is_err() {
                assert_eq!(stack.0[0].weight().to_vec2::<f32>()?, before);
            }
            step.map(drop)
        });
        let error = done.err()?;
        assert_eq!(error.code(), codes::OUT_OF_MEMORY);
        let (wanted, _) = error
            .message()
            .split_once(": memory for ")
            .unwrap_or(("", error.message()));
        Some(error.message()[wanted.len()..].to_owned())
    };
    let is = |found: Option<String>, part: &str| {
        assert!(
            found.as_ref().is_some_and(|text| text.contains(part)),
            "{found:?} {part}"
        );
    };
    let plain = Settings::default().with("policy", "input").unwrap();
    is(
        fails(PARAMETERS - 1, plain.clone()),
        "memory for the parameters",
    );
    is(
        fails(PARAMETERS + 1, plain.clone()),
        "memory for what the forward keeps",
    );
    is(
        fails(PARAMETERS + 1000, plain.clone()),
        "memory for gradients",
    );
    is(
        fails(3 * PARAMETERS, plain.clone()),
        "memory for the optimizer",
    );
    assert_eq!(fails(4 * PARAMETERS, plain.clone()), None);
    // What the messages advise is what helps.
    assert_eq!(
        fails(3 * PARAMETERS + 600, plain.with_optimizer(Place::Host)),
        None
    );
    let shared = Settings::default().with_dp(4).with_zero(Zero::Stage1);
    assert_eq!(fails(3 * PARAMETERS, shared), None);
}
