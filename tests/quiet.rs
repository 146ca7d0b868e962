//! A library that says nothing by itself, and tells whoever asks what it is doing.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use autosp::prelude::*;
use autosp::settings::Policy;
use candle_core::DType;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// The example GPT-2 with the attribute.
#[autosp::sequence_parallel]
#[allow(dead_code, missing_docs, unreachable_pub, clippy::pedantic)]
mod gpt2 {
    include!("../examples/models/gpt2.rs");
}

/// Three steps on two ranks, an evaluation and a saved model.
fn train() {
    let config = gpt2::Config {
        vocab_size: 256,
        n_positions: 16,
        n_embd: 16,
        n_layer: 2,
        n_head: 4,
        layer_norm_epsilon: 1e-5,
    };
    let text = TextData::from_text("the same eight words, again and again and again");
    let path =
        std::env::temp_dir().join(format!("autosp-quiet-{}.safetensors", std::process::id()));
    let settings = Settings::default().with_sp(2).with_policy(Policy::Input);
    autosp::run_with(settings, |sp| {
        let parameters = Parameters::init(7, DType::F32, sp.device());
        let model = gpt2::Gpt2::load(parameters.builder(), &config)?;
        let mut trainer = Trainer::new(sp, parameters, TrainSettings::default())?;
        for step in 0..3 {
            let batch = sp.shard(&text.batch(1, step, 2, 15)?)?;
            let loss =
                || autosp::loss::cross_entropy(&model.forward(&batch.tokens)?, &batch.labels);
            trainer.step(loss)?;
            if step == 2 {
                trainer.evaluate(loss)?;
            }
        }
        trainer.save(&path)
    })
    .unwrap();
    std::fs::remove_file(path).unwrap();
}

/// Marks the process that the other test starts.
const CHILD: &str = "TESTS_QUIET_CHILD";

#[test]
fn nothing_is_printed_and_no_subscriber_installed() {
    if std::env::var_os(CHILD).is_some() {
        train();
        assert!(!tracing::dispatcher::has_been_set());
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "nothing_is_printed_and_no_subscriber_installed",
            "--nocapture",
            "--quiet",
        ])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let (out, errors) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert!(output.status.success(), "{out}{errors}");
    assert_eq!(errors, "");
    // What the test harness itself says.
    let said = |line: &&str| {
        !line.is_empty()
            && !line.starts_with("running 1 test")
            && !line.starts_with("test result: ok")
            && *line != "."
    };
    assert_eq!(
        out.lines().filter(said).collect::<Vec<_>>(),
        Vec::<&str>::new()
    );
}

/// How often a span or event was seen, and with which fields.
type Seen = (usize, Vec<String>);

/// Counts spans and events by name.
#[derive(Clone, Default)]
struct Counts {
    seen: Arc<Mutex<BTreeMap<String, Seen>>>,
    next: Arc<AtomicU64>,
}

struct Names(Vec<String>);

impl Visit for Names {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.0.push(format!("{}={value:?}", field.name()));
    }
}

impl Counts {
    fn count(&self, name: &str, record: impl FnOnce(&mut Names)) {
        let mut names = Names(Vec::new());
        record(&mut names);
        let mut seen = self.seen.lock().unwrap();
        let entry = seen.entry(name.to_owned()).or_default();
        entry.0 += 1;
        entry.1.extend(names.0);
    }
}

impl Subscriber for Counts {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("autosp")
    }
    fn new_span(&self, span: &Attributes<'_>) -> Id {
        self.count(span.metadata().name(), |names| span.record(names));
        Id::from_u64(1 + self.next.fetch_add(1, Ordering::Relaxed))
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, event: &Event<'_>) {
        let mut message = Names(Vec::new());
        event.record(&mut message);
        let name = message
            .0
            .iter()
            .find_map(|field| field.strip_prefix("message="))
            .unwrap_or_default()
            .to_owned();
        self.count(&name, |names| names.0 = message.0);
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn whoever_asks_is_told() {
    let counts = Counts::default();
    // A subscriber of the calling thread alone: ranks are watched as their caller is.
    tracing::subscriber::with_default(counts.clone(), train);
    let seen = counts.seen.lock().unwrap();
    let count = |name: &str| seen.get(name).map_or(0, |(count, _)| *count);
    let ranks = 2;
    assert_eq!(count("rank"), ranks);
    assert_eq!(count("step"), 3 * ranks);
    assert_eq!(count("evaluation"), ranks);
    assert_eq!(count("optimizer"), 3 * ranks);
    assert_eq!(count("reduction"), 3 * ranks);
    assert_eq!(count("step done"), 3 * ranks);
    assert_eq!(count("saved"), 1);
    // Each block runs once in the forward and once more in the backward.
    assert_eq!(count("recomputation"), 3 * 2 * ranks);
    // Two blocks of two head groups: in an evaluation forward, in a step forward twice and backward.
    assert!(
        count("attention") >= (3 * 2 + 1) * 2 * ranks,
        "{}",
        count("attention")
    );
    assert!(count("exchange") > count("attention"));
    assert_eq!(count("setting"), autosp::settings::KEYS.len());
    let fields = |name: &str| seen[name].1.join(" ");
    for (name, part) in [
        ("step", "step=3"),
        ("step done", "loss="),
        ("exchange", "Attention::forward"),
        ("setting", "source=the program"),
        ("rank", "rank=1"),
    ] {
        assert!(
            fields(name).contains(part),
            "{name}: {part} is missing in {}",
            fields(name)
        );
    }
}
