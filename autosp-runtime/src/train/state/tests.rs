use std::fs;
use std::path::PathBuf;

use autosp_plan::Settings;
use autosp_plan::settings::{Place, Zero};
use candle_core::{DType, Module};
use proptest::prelude::*;

use super::*;
use crate::ops::dropout;
use crate::scope::{self, Shard};
use crate::train::{Schedule, TrainSettings};
use crate::{Parameters, loss, run_with};

const ROWS: usize = 12;

/// A folder that is removed in the end.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("autosp-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[derive(Debug, Clone, Copy)]
struct How {
    mesh: (usize, usize),
    zero: Zero,
    place: Place,
    optimizer: Optimizer,
    dtype: DType,
    /// Width of the hidden layer.
    width: usize,
    /// The seed of the dropout after the first layer, where there is one. Its tokens are the rows, so that there is one copy (dp = 1).
    dropout: Option<u64>,
}

const HOW: How = How {
    mesh: (2, 2),
    zero: Zero::Stage1,
    place: Place::Device,
    optimizer: Optimizer::adamw(),
    dtype: DType::F32,
    width: 7,
    dropout: None,
};

impl How {
    /// Resumes from the folder, takes `steps` steps, saves, and returns the losses and what was resumed.
    fn train(self, folder: &Folder, steps: u64) -> Result<(Vec<f64>, Option<Resumed>)> {
        let settings = Settings::default()
            .with_dp(self.mesh.0)
            .with_sp(self.mesh.1)
            .with_zero(self.zero)
            .with_optimizer(self.place);
        let mut ranks = run_with(settings, |sp| {
            let parameters = Parameters::init(7, self.dtype, &Device::Cpu);
            let vb = parameters.builder();
            let first = candle_nn::linear(4, self.width, vb.pp("first"))?;
            let second = candle_nn::linear(self.width, 3, vb.pp("second"))?;
            let how = TrainSettings {
                optimizer: self.optimizer,
                schedule: Schedule::cosine(0.05, 3, 30),
                bucket_bytes: 64,
                ..TrainSettings::default()
            };
            let mut trainer = Trainer::new(sp, parameters, how)?;
            if let Some(seed) = self.dropout {
                sp.set_seed(seed);
            }
            let resumed = trainer.resume(&folder.0)?;
            let mut losses = Vec::new();
            for _ in 0..steps {
                let len = ROWS / sp.world_size();
                let step = trainer.steps() as f32;
                let x = Tensor::arange(0f32, (ROWS * 4) as f32, &Device::Cpu)?;
                let x = ((x * 0.7)? + f64::from(step))?.sin()?.reshape((ROWS, 4))?;
                let x = x.to_dtype(self.dtype)?.narrow(0, sp.rank() * len, len)?;
                let first_row = (sp.rank() * len) as i64;
                let labels: Vec<i64> = (first_row..).map(|row| row % 3).take(len).collect();
                let labels = Tensor::from_vec(labels, len, &Device::Cpu)?;
                if self.dropout.is_some() {
                    let shard = Shard::new(ROWS, sp.sp_rank(), sp.mesh().sp);
                    sp.register_shard(x.id(), shard)?;
                }
                let report = trainer.step(|| {
                    let mut hidden = first.forward(&x)?.silu()?;
                    if self.dropout.is_some() {
                        scope::enter("test", &[("x", &x, 0)])?;
                        hidden = dropout(&hidden, 0.3, [None, Some(0)])?;
                    }
                    loss::cross_entropy(&second.forward(&hidden)?, &labels)
                })?;
                losses.push(report.loss);
            }
            let note = format!("after {} steps", trainer.steps());
            trainer.save_checkpoint(&folder.0, &note)?;
            Ok((losses, resumed))
        })?;
        Ok(ranks.remove(0))
    }
}

fn bits(losses: &[f64]) -> Vec<u64> {
    losses.iter().map(|loss| loss.to_bits()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// In two parts on one mesh: the bits of one run. On another mesh: the same within rounding.
    #[test]
    fn a_run_goes_on_as_if_it_had_not_stopped(
        meshes in prop::sample::select(vec![((2, 2), (1, 1)), ((1, 3), (2, 1)), ((1, 1), (3, 2)), ((3, 2), (2, 2))]),
        from in any::<bool>(), to in any::<bool>(), half in any::<bool>(),
        places in prop::array::uniform2(prop::sample::select(vec![Place::Device, Place::Host])),
        optimizer in prop::sample::select(vec![Optimizer::adamw(), Optimizer::sgd(), Optimizer::Sgd { momentum: 0.9, weight_decay: 0.0 }]),
        cut in 0u64..5,
    ) {
        let zero = |one: bool| if one { Zero::Stage1 } else { Zero::Stage0 };
        let how = How {
            mesh: meshes.0, zero: zero(from), place: places[0], optimizer,
            dtype: if half { DType::BF16 } else { DType::F32 }, ..HOW
        };
        let (whole, parts, other) = (Folder::new("whole"), Folder::new("parts"), Folder::new("other"));
        let expected = how.train(&whole, 8).unwrap().0;
        let mut losses = how.train(&parts, cut).unwrap().0;
        for entry in fs::read_dir(&parts.0).unwrap() {
            let entry = entry.unwrap();
            copy(&entry.path(), &other.0.join(entry.file_name()));
        }
        // The state may move between device and host.
        let (rest, resumed) = How { place: places[1], ..how }.train(&parts, 8 - cut).unwrap();
        prop_assert_eq!(resumed, Some(Resumed { step: cut, note: format!("after {cut} steps") }));
        losses.extend(rest);
        prop_assert_eq!(bits(&losses), bits(&expected));

        let how = How { mesh: meshes.1, zero: zero(to), ..how };
        let (rest, _) = how.train(&other, 8 - cut).unwrap();
        let tolerance = if half { 1e-2 } else { 1e-5 };
        for (found, expected) in rest.iter().zip(&expected[cut as usize..]) {
            prop_assert!((found - expected).abs() <= tolerance * expected, "{found} {expected}");
        }
    }
}

fn copy(from: &Path, to: &Path) {
    if from.is_dir() {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            copy(&entry.path(), &to.join(entry.file_name()));
        }
    } else {
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    }
}

/// Draws go on where they stopped, with the seed that they began with.
#[test]
fn dropout_goes_on_as_if_it_had_not_stopped() {
    let seeded = |mesh, seed| How {
        mesh,
        dropout: Some(seed),
        ..HOW
    };
    let (whole, parts) = (Folder::new("draws-whole"), Folder::new("draws-parts"));
    let (expected, _) = seeded((1, 2), 5).train(&whole, 5).unwrap();
    let (first, _) = seeded((1, 2), 5).train(&parts, 2).unwrap();
    let other = Folder::new("draws-other");
    copy(&parts.0, &other.0);
    let (second, _) = seeded((1, 2), 6).train(&parts, 3).unwrap();
    assert_eq!(bits(&[first.clone(), second].concat()), bits(&expected));
    let (second, _) = seeded((1, 3), 6).train(&other, 3).unwrap();
    for (found, expected) in [first, second].concat().iter().zip(&expected) {
        assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
    }
    let fresh = Folder::new("draws-fresh");
    let (drawn, _) = seeded((1, 2), 6).train(&fresh, 5).unwrap();
    assert_ne!(bits(&drawn), bits(&expected), "the seed says what is drawn");
}

#[test]
fn what_an_interruption_leaves_is_passed_over() {
    let folder = Folder::new("interrupted");
    for step in 1..=4 {
        HOW.train(&folder, 1).unwrap();
        // The latest and the one before.
        let count = fs::read_dir(&folder.0)
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().path().is_dir())
            .count();
        assert_eq!(count, step.min(2));
    }
    let resumed = || HOW.train(&folder, 0).unwrap().1.unwrap().step;
    // A checkpoint without a manifest.
    fs::create_dir_all(folder.0.join("step-00000005")).unwrap();
    fs::write(
        folder.0.join("step-00000005/parameters.safetensors"),
        "half",
    )
    .unwrap();
    assert_eq!(resumed(), 4);
    // One that `latest` names and that has lost a file, or a part of one: the one before.
    let latest = fs::read_to_string(folder.0.join("latest")).unwrap();
    let state = folder
        .0
        .join(latest.trim())
        .join("optimizer-1-of-4.safetensors");
    let bytes = fs::read(&state).unwrap();
    let other = files::latest(&folder.0).unwrap().unwrap();
    assert_eq!(other, latest.trim());
    fs::write(&state, &bytes[..bytes.len() - 1]).unwrap();
    let fallback = files::latest(&folder.0).unwrap().unwrap();
    assert_ne!(fallback, other);
    fs::remove_file(&state).unwrap();
    assert_eq!(files::latest(&folder.0).unwrap().unwrap(), fallback);
    // Without the pointer, the last one that is whole.
    fs::remove_file(folder.0.join("latest")).unwrap();
    assert_eq!(files::latest(&folder.0).unwrap().unwrap(), fallback);
    // None that is whole is an error, not a run from the beginning.
    fs::write(folder.0.join(&fallback).join("manifest.json"), "{}").unwrap();
    let error = files::latest(&folder.0).unwrap_err();
    assert_eq!(error.code(), codes::FILE_BROKEN, "{error}");
    let none = Folder::new("nothing");
    assert_eq!(files::latest(&none.0).unwrap(), None);
    assert_eq!(HOW.train(&none, 0).unwrap().1, None);
}

#[test]
fn another_model_or_optimizer_is_refused() {
    let folder = Folder::new("other-model");
    HOW.train(&folder, 2).unwrap();
    for (how, expected) in [
        (How { width: 8, ..HOW }, "[8]"),
        (
            How {
                dtype: DType::BF16,
                ..HOW
            },
            "BF16",
        ),
        (
            How {
                optimizer: Optimizer::sgd(),
                ..HOW
            },
            "sgd",
        ),
    ] {
        let error = how.train(&folder, 1).unwrap_err();
        assert!(
            error.code() == codes::CHECKPOINT && error.message().contains(expected),
            "{error}"
        );
    }
    assert_eq!(HOW.train(&folder, 0).unwrap().1.unwrap().step, 2);
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error() {
    let folder = Folder::new("a-file");
    fs::write(&folder.0, "").unwrap();
    let error = HOW.train(&folder, 1).unwrap_err();
    assert_eq!(error.code(), codes::FILE_UNWRITABLE, "{error}");
    let _ = fs::remove_file(&folder.0);
}
