//! An estimate as text and as JSON.

use autosp_plan::codes;
use autosp_plan::planner::{Abilities, Ability, Choice, Estimate, Job, Time};
use autosp_plan::units::{show_length, show_seconds, show_size};
use autosp_templates::report::estimate as report;
use serde_json::{Map, Value, json};

use super::Sources;
use crate::Failure;

/// Each choice with its name, as a table and JSON have it.
fn choices(choice: &Choice) -> [(&'static str, Value); 8] {
    [
        ("sp", json!(choice.sp)),
        ("dp", json!(choice.dp)),
        ("zero", json!(choice.stage)),
        ("policy", json!(choice.layers.to_string())),
        ("groups", json!(choice.groups)),
        ("mlp_tiles", json!(choice.mlp_tiles)),
        ("loss_tiles", json!(choice.loss_tiles)),
        ("host_optimizer", json!(choice.host_optimizer)),
    ]
}

/// What `choice` needs that the trainer of this version does not do.
fn missing(choice: &Choice) -> Vec<Ability> {
    let missing = choice.needs().without(Abilities::TRAINER);
    missing.iter().collect()
}

/// A length that is easy to read: whole units, or thousands with three digits.
fn length(tokens: usize) -> String {
    if tokens.is_multiple_of(1 << 10) {
        return show_length(tokens);
    }
    match tokens {
        0..10_240 => tokens.to_string(),
        _ => format!("{:.1}K", tokens as f64 / 1024.0),
    }
}

/// For people.
pub(super) fn text(name: &str, job: &Job, found: &Estimate, sources: &Sources) -> String {
    let model = &job.model;
    let (memory, time, choice) = (&found.memory, &found.time, &found.choice);
    let source = |name: &str| {
        let said = sources.iter().find(|(known, _)| *known == name);
        said.map_or(String::new(), |(_, source)| source.clone())
    };
    let total = time.total();
    let verdict = format!(
        "{} tokens: {}",
        length(found.seq),
        if found.feasible {
            "fits"
        } else {
            "does not fit"
        }
    );
    let stops = if found.feasible {
        "a longer one is stopped by"
    } else {
        "stopped by"
    };
    let totals = [
        ("peak", memory.peak),
        ("of", job.machine.usable()),
        ("host, all its ranks", memory.host),
        ("of", job.machine.host_bytes),
    ];
    let text = report::Estimate {
        model: format!(
            "{name}: {:.2} billion parameters, {} blocks, hidden {}, ffn {}, heads {}/{} of {}, vocabulary {}{}",
            model.parameters() as f64 / 1e9,
            model.layers,
            model.hidden,
            model.ffn,
            model.heads,
            model.kv_heads,
            model.head_dim,
            model.vocabulary,
            if model.tied { ", tied" } else { "" }
        ),
        machine: format!(
            "{} GPUs of {}, hosts of {}, {} bytes an element, batch of {} a replica",
            job.machine.gpus,
            show_size(job.machine.device_bytes),
            show_size(job.machine.host_bytes),
            job.dtype_bytes,
            job.batch
        ),
        verdict,
        choices: choices(choice)
            .into_iter()
            .map(|(name, value)| {
                let value = value.as_str().map_or(value.to_string(), str::to_owned);
                [name.to_owned(), value, source(name)]
            })
            .collect(),
        memory: memory
            .parts
            .iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(part, bytes)| [part.name().to_owned(), show_size(*bytes)])
            .collect(),
        region: memory.region.to_owned(),
        totals: totals.map(|(name, bytes)| [name.to_owned(), show_size(bytes)]).to_vec(),
        time: seconds(time),
        rate: vec![
            format!("{:<26} {:>12}", "step", show_seconds(total)),
            format!(
                "{:.0} tokens/s; {:.0} model TFLOP/s per GPU, of 6 Nm S + 6 L S^2 q a sequence, recomputation not counted",
                found.tokens_per_second(job),
                found.flops(job) / 1e12
            ),
        ],
        limits: vec![
            [stops.to_owned(), found.limiter.to_string()],
            ["longest sequence".to_owned(), length(found.max_seq)],
        ],
        advice: found
            .advice
            .iter()
            .map(|advice| [advice.what.clone(), length(advice.max_seq)])
            .collect(),
        needs: missing(choice)
            .into_iter()
            .map(|ability| {
                format!("this needs {}, which the trainer of this version does not do", ability.meaning())
            })
            .collect(),
    }
    .to_string();
    // Columns are padded, also the last.
    text.lines()
        .map(|line| line.trim_end().to_owned() + "\n")
        .collect()
}

/// The parts of a step that take time, with their share.
fn seconds(time: &Time) -> Vec<[String; 3]> {
    let total = time.total();
    let parts = time
        .parts()
        .into_iter()
        .filter(|(_, seconds)| *seconds > 0.0);
    let row = |(name, seconds): (&str, f64)| {
        let share = format!("{:.0} %", 100.0 * seconds / total);
        [name.to_owned(), show_seconds(seconds), share]
    };
    parts.map(row).collect()
}

/// For programs.
pub(super) fn json(name: &str, job: &Job, found: &Estimate) -> Result<String, Failure> {
    let memory = &found.memory;
    let bytes: Map<String, Value> = memory
        .parts
        .iter()
        .map(|(part, bytes)| (part.name().replace(' ', "_"), json!(bytes)))
        .collect();
    let seconds: Map<String, Value> = found
        .time
        .parts()
        .into_iter()
        .map(|(name, seconds)| (name.replace(", ", "_").replace(' ', "_"), json!(seconds)))
        .collect();
    let advice: Vec<Value> = found
        .advice
        .iter()
        .map(
            |advice| json!({"change": advice.what, "max_seq": advice.max_seq, "runs": advice.runs}),
        )
        .collect();
    let needs: Vec<&str> = missing(&found.choice)
        .into_iter()
        .map(Ability::name)
        .collect();
    let mut document = json!({
        "model": name,
        "parameters": job.model.parameters(),
        "seq": found.seq,
        "feasible": found.feasible,
        "limiter": found.limiter.to_string(),
        "peak_bytes": memory.peak,
        "usable_bytes": job.machine.usable(),
        "host_bytes": memory.host,
        "max_seq": found.max_seq,
        "step_s": found.time.total(),
        "tokens_per_s": found.tokens_per_second(job),
        "model_tflops_per_gpu": found.flops(job) / 1e12,
        "memory": bytes,
        "region": memory.region,
        "time": seconds,
        "advice": advice,
        "needs": needs,
    });
    if let Some(map) = document.as_object_mut() {
        map.extend(choices(&found.choice).map(|(name, value)| (name.to_owned(), value)));
    }
    let text = serde_json::to_string_pretty(&document).map_err(|error| {
        let message = format!("cannot print the estimate of `{name}`: {error}");
        Failure::new(&codes::UNREADABLE_FILE, message)
    })?;
    Ok(text + "\n")
}
