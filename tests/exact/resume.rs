//! A run that is killed at any moment goes on from its last checkpoint, with the same bits.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use autosp::loss::cross_entropy;
use autosp::{Parameters, Schedule, Settings, TrainSettings, Trainer};
use autosp_plan::settings::{Policy, Zero};
use candle_core::{DType, Tensor};

use crate::job::draw;
use crate::trained::{Model, VOCABULARY, annotated};

/// Steps of the whole run.
const STEPS: u64 = 24;

/// The folder of a run that this process is to go on with.
const FOLDER: &str = "EXACT_RESUME_FOLDER";

fn mesh(dp: usize, sp: usize, zero: Zero) -> Settings {
    Settings::default()
        .with_dp(dp)
        .with_sp(sp)
        .with_zero(zero)
        .with_policy(Policy::Attention)
}

/// The batch of a step: a function of the step alone, so that the step is the position in the data.
fn tokens(step: u64) -> Tensor {
    let tokens: Vec<u32> = (0..2 * 29)
        .map(|i| (draw(step, i) % VOCABULARY as u64) as u32)
        .collect();
    Tensor::from_vec(tokens, (2, 29), &candle_core::Device::Cpu).unwrap()
}

/// Trains to step `end`, from the latest checkpoint if a folder has one, saving every step. Calls `log` with each step and its loss.
fn train(
    settings: Settings,
    folder: Option<&Path>,
    end: u64,
    log: impl Fn(u64, f64) + Sync,
) -> autosp::Result<()> {
    autosp::run_with(settings, |sp| {
        let parameters = Parameters::init(5, DType::F32, sp.device());
        let model = annotated(Model::Llama, parameters.builder(), DType::F32)?;
        let how = TrainSettings {
            schedule: Schedule::cosine(3e-3, 4, STEPS),
            ..TrainSettings::default()
        };
        let mut trainer = Trainer::new(sp, parameters, how)?;
        let mut position = 0;
        if let Some(folder) = folder
            && let Some(resumed) = trainer.resume(folder)?
        {
            position = resumed.note.parse().expect("what was noted");
            assert_eq!(position, resumed.step);
        }
        while trainer.steps() < end {
            let batch = sp.shard(&tokens(position))?;
            let report = trainer
                .step(|| cross_entropy(&model(&batch.tokens, &batch.tokens)?, &batch.labels))?;
            position += 1;
            if sp.is_main() {
                log(report.step, report.loss);
            }
            if let Some(folder) = folder {
                trainer.save_checkpoint(folder, &position.to_string())?;
            }
        }
        Ok(())
    })
    .map(drop)
}

/// The losses of a run without interruption.
fn uninterrupted(settings: Settings) -> BTreeMap<u64, f64> {
    let losses = std::sync::Mutex::new(BTreeMap::new());
    train(settings, None, STEPS, |step, loss| {
        losses.lock().unwrap().insert(step, loss);
    })
    .unwrap();
    losses.into_inner().unwrap()
}

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// The killed process is this test itself, which then goes on with the run that it finds in the folder.
#[test]
fn killed_at_any_moment() {
    let settings = || mesh(2, 2, Zero::Stage1);
    if let Some(folder) = std::env::var_os(FOLDER) {
        let folder = PathBuf::from(folder);
        let log = |step: u64, loss: f64| {
            let line = format!("{step} {}\n", loss.to_bits());
            let mut file = OpenOptions::new()
                .append(true)
                .create(true)
                .open(folder.join("log"))
                .unwrap();
            file.write_all(line.as_bytes()).unwrap();
        };
        train(settings(), Some(&folder.join("run")), STEPS, log).unwrap();
        return;
    }
    let folder = folder("killed");
    let start = || {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "resume::killed_at_any_moment"])
            .args(["--test-threads", "1"])
            .env(FOLDER, &folder)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let steps = || {
        fs::read_to_string(folder.join("log"))
            .unwrap_or_default()
            .lines()
            .count()
    };
    let mut kills = 0;
    for round in 0..40 {
        let (mut child, known, begun) = (start(), steps(), Instant::now());
        // Some are killed while they start, the others a moment after their first, second or third step.
        let steps_first = round % 4;
        while steps() < known + steps_first as usize
            && child.try_wait().unwrap().is_none()
            && begun.elapsed() < Duration::from_mins(1)
        {
            sleep(Duration::from_millis(1));
        }
        sleep(Duration::from_micros(draw(3, round) % 30_000));
        if child.try_wait().unwrap().is_some() {
            let output = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}");
            break;
        }
        // SIGKILL on Unix.
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
    }
    let last = start().wait_with_output().unwrap();
    assert!(
        last.status.success(),
        "{}",
        String::from_utf8_lossy(&last.stderr)
    );
    assert!(kills >= 4, "{kills}");
    let expected = uninterrupted(settings());
    let log = fs::read_to_string(folder.join("log")).unwrap();
    let mut seen = vec![0; STEPS as usize + 1];
    for line in log.lines() {
        let (step, bits) = line.split_once(' ').unwrap();
        let (step, bits): (u64, u64) = (step.parse().unwrap(), bits.parse().unwrap());
        assert_eq!(bits, expected[&step].to_bits(), "step {step}");
        seen[step as usize] += 1;
    }
    assert!(seen[1..].iter().all(|&times| times > 0), "{seen:?}");
    // A step is repeated only if its checkpoint was not complete.
    assert!(seen.iter().sum::<i32>() <= STEPS as i32 + kills, "{seen:?}");
}

#[test]
fn on_another_mesh() {
    let folder = folder("meshes");
    train(mesh(2, 2, Zero::Stage1), Some(&folder), 6, |_, _| ()).unwrap();
    let expected = uninterrupted(mesh(2, 2, Zero::Stage1));
    for (dp, sp, zero) in [
        (1, 1, Zero::Stage0),
        (1, 4, Zero::Stage1),
        (2, 1, Zero::Stage0),
        (2, 4, Zero::Stage2),
    ] {
        // A copy: each mesh goes on from the same place.
        let own = folder.with_file_name(format!("meshes-{dp}-{sp}"));
        let _ = fs::remove_dir_all(&own);
        copy(&folder, &own);
        train(mesh(dp, sp, zero), Some(&own), 12, |step, loss| {
            let expected = expected[&step];
            assert!(
                (loss - expected).abs() <= 1e-5 * expected,
                "dp {dp} sp {sp} {zero:?}, step {step}: expected {expected}, found {loss}"
            );
        })
        .unwrap();
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (from, to) = {
            let entry = entry.unwrap();
            (entry.path(), to.join(entry.file_name()))
        };
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(&from, &to).unwrap();
        }
    }
}
