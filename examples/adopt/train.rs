//! Trains candle-transformers' Qwen2 on text, on one rank and on four, and compares what they learn.
//!
//! `src/qwen2.rs` is what `cargo autosp adopt candle-transformers qwen2 --out src/qwen2.rs` writes: the file of that crate under the
//! attribute. Its `forward` keeps the last token; `forward_loss`, which the attribute adds, is the loss over all of them.

mod qwen2;

use autosp::{
    codes, Error, Optimizer, Parameters, Result, Schedule, Settings, TextData, TrainSettings,
    Trainer,
};
use candle_core::DType;

const RANKS: usize = 4;
const ROWS: usize = 4;
const SEQ_LEN: usize = 192;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let steps = arguments
        .next()
        .and_then(|steps| steps.parse().ok())
        .unwrap_or(100);
    let files: Vec<String> = arguments.collect();
    let text = TextData::open(&files)?;
    println!(
        "{} bytes of text, {steps} steps of {ROWS} x {SEQ_LEN} tokens",
        text.len()
    );
    let (alone, ranks) = (losses(1, steps, &text)?, losses(RANKS, steps, &text)?);
    println!("step   one rank   {RANKS} ranks");
    let mut apart: f64 = 0.0;
    for (step, (a, b)) in alone.iter().zip(&ranks).enumerate() {
        apart = apart.max((a - b).abs() / a);
        if step % (steps / 5) as usize == 0 || step + 1 == alone.len() {
            println!("{:4}   {a:.6}   {b:.6}", step + 1);
        }
    }
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let fifth = alone.len() / 5;
    let (first, last) = (mean(&ranks[..fifth]), mean(&ranks[ranks.len() - fifth..]));
    println!("loss of the first and of the last fifth: {first:.4}, {last:.4}; largest difference: {apart:.1e}");
    if last >= first || apart > 1e-3 {
        let message = "expected a loss that falls, and falls on four ranks as on one";
        return Err(Error::new(codes::ARGUMENT, message));
    }
    Ok(())
}

/// The loss of every step on so many ranks.
fn losses(ranks: usize, steps: u64, text: &TextData) -> Result<Vec<f64>> {
    let all = autosp::run_with(Settings::default().with_sp(ranks), |sp| {
        let parameters = Parameters::init(1, DType::F32, sp.device());
        let mut model = qwen2::ModelForCausalLM::new(&config(), parameters.builder())?;
        let settings = TrainSettings {
            optimizer: Optimizer::AdamW {
                beta1: 0.9,
                beta2: 0.95,
                eps: 1e-8,
                weight_decay: 0.1,
            },
            schedule: Schedule::cosine(3e-3, steps / 10, steps),
            ..TrainSettings::default()
        };
        let mut trainer = Trainer::new(sp, parameters, settings)?;
        let mut losses = Vec::new();
        for step in 0..steps {
            let (tokens, labels) = text.labelled_batch(1, step, ROWS, SEQ_LEN)?;
            let batch = sp.shard_labelled(&tokens, &labels)?;
            let done = trainer.step(|| model.forward_loss(&batch.tokens, 0, &batch.labels))?;
            losses.push(done.loss);
        }
        Ok(losses)
    })?;
    Ok(all.into_iter().next().unwrap_or_default())
}

/// Four query heads over two key heads, in two layers; every byte is a token.
fn config() -> qwen2::Config {
    qwen2::Config {
        vocab_size: 256,
        hidden_size: 64,
        intermediate_size: 160,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: SEQ_LEN,
        sliding_window: SEQ_LEN,
        max_window_layers: 2,
        tie_word_embeddings: false,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-6,
        use_sliding_window: false,
        hidden_act: candle_nn::Activation::Silu,
    }
}
