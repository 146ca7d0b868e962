//! A training loop of one's own: the attribute, `sp.shard`, the loss and `sp.reduce_gradients`, with candle's optimizer.
//!
//! `cargo run --release --example own_loop`

use autosp::{Parameters, Settings, TextData, loss::cross_entropy};
use candle_core::DType;
use candle_nn::{AdamW, Optimizer, ParamsAdamW};

/// GPT-2 as its users write it.
#[autosp::sequence_parallel]
#[allow(missing_docs, clippy::pedantic)]
mod gpt2 {
    include!("models/gpt2.rs");
}

const STEPS: u64 = 60;

fn main() -> autosp::Result<()> {
    let text = TextData::open(&[concat!(env!("CARGO_MANIFEST_DIR"), "/docs")])?;
    let config = gpt2::Config {
        vocab_size: 256,
        n_positions: 256,
        n_embd: 64,
        n_layer: 2,
        n_head: 8,
        layer_norm_epsilon: 1e-5,
    };
    // Four ranks share each sequence, unless `AUTOSP_SP=2` or a line in `autosp.toml` says otherwise.
    let losses = autosp::run_with(Settings::default().with_sp(4).loaded()?, |sp| {
        let parameters = Parameters::init(1, DType::F32, sp.device());
        let model = gpt2::Gpt2::load(parameters.builder(), &config)?;
        let vars = parameters.vars();
        let mut optimizer = AdamW::new(
            vars.clone(),
            ParamsAdamW {
                lr: 3e-3,
                ..ParamsAdamW::default()
            },
        )?;
        let mut losses = Vec::new();
        for step in 0..STEPS {
            // The same global batch on every rank; each takes its rows and its part of the sequence.
            let batch = sp.shard(&text.batch(7, step, 2, 256)?)?;
            let (loss, mut gradients) = sp.scope(|| -> autosp::Result<_> {
                let loss = cross_entropy(&model.forward(&batch.tokens)?, &batch.labels)?;
                Ok((loss.to_scalar::<f32>()?, loss.backward()?))
            })?;
            sp.reduce_gradients(&mut gradients, &vars)?;
            optimizer.step(&gradients)?;
            losses.push(loss);
        }
        Ok(losses)
    })?;
    // Every rank holds the loss of the whole batch.
    for (step, loss) in losses[0].iter().enumerate() {
        #[allow(clippy::print_stdout)]
        {
            println!("step {:>2}  loss {loss:.4}", step + 1);
        }
    }
    Ok(())
}
