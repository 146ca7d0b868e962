//! A schedule is code in the user's module: what is edited there is what runs, and a mistake is found before data moves.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::pedantic)]

pub mod emitted {
    include!(concat!(env!("OUT_DIR"), "/emitted.rs"));
}

pub mod serial {
    include!(concat!(env!("OUT_DIR"), "/serial.rs"));
}

pub mod broken {
    include!(concat!(env!("OUT_DIR"), "/broken.rs"));
}

#[cfg(test)]
mod tests {
    use autosp::schedule::{Event, Recorder, Timeline};
    use autosp::{Parameters, Settings};
    use candle_core::{DType, Tensor};

    use super::{broken, emitted, serial};

    /// The loss on two ranks with two head groups, and what happened when on each.
    macro_rules! run {
        ($model:ident) => {{
            autosp::run_with(Settings::default().with_sp(2).with_groups(2), |sp| {
                let config = $model::Config {
                    vocab_size: 50,
                    hidden_size: 64,
                    intermediate_size: 96,
                    num_hidden_layers: 1,
                    num_attention_heads: 8,
                    num_key_value_heads: 4,
                    head_dim: None,
                    max_position_embeddings: 512,
                    rope_theta: 1e4,
                    rms_norm_eps: 1e-6,
                    tie_word_embeddings: false,
                    last_token_only: false,
                };
                let parameters = Parameters::init(3, DType::F32, sp.device());
                let model = $model::Llama::load(parameters.builder(), &config)?;
                let tokens = Tensor::arange(0u32, 300, sp.device())?.reshape((1, 300))?;
                let tokens = (tokens.to_dtype(DType::F32)? * 0.1)?.to_dtype(DType::U32)?;
                let batch = sp.shard(&tokens)?;
                let timeline = Timeline::default();
                let _recording = timeline.attach();
                let loss = sp.scope(|| -> autosp::Result<f32> {
                    let mut cache = $model::Cache::new(false, DType::F32, &config, sp.device())?;
                    let logits = model.forward(&batch.tokens, 0, &mut cache)?;
                    let loss = autosp::loss::cross_entropy(&logits, &batch.labels)?;
                    loss.backward()?;
                    Ok(loss.to_scalar()?)
                })?;
                Ok((loss, timeline.events()))
            })
        }};
    }

    fn find<'e>(events: &'e [Event], verb: &str, group: usize) -> &'e Event {
        events
            .iter()
            .find(|e| e.verb == verb && e.group == group)
            .expect("the event")
    }

    #[test]
    fn what_is_emitted_overlaps_and_an_edit_changes_what_runs() {
        let (overlapped, one_by_one) =
            (run!(emitted).expect("a run"), run!(serial).expect("a run"));
        for (a, b) in overlapped.iter().zip(&one_by_one) {
            assert_eq!(a.0.to_bits(), b.0.to_bits(), "the order changes no number");
            let next = |events: &[Event]| {
                find(events, "send_qkv", 1).start < find(events, "attend", 0).end
            };
            assert!(next(&a.1), "the next exchange starts before attention ends");
            assert!(!next(&b.1), "the edited schedule waits for attention");
        }
    }

    #[test]
    fn a_dropped_wait_is_found_before_data_moves() {
        let error = run!(broken).expect_err("a schedule that reads what has not landed");
        assert_eq!(error.code().id, "AS0328", "{error}");
        assert!(error.to_string().contains("wait_qkv"), "{error}");
    }

    #[test]
    fn the_recorder_takes_what_is_emitted_and_refuses_the_edit() {
        for groups in 1..=4 {
            let needs: Vec<Vec<usize>> = (0..groups).map(|g| vec![g]).collect();
            Recorder::forward::<emitted::autosp_sites::Site0>(&needs)
                .expect("the emitted schedule");
            Recorder::backward::<emitted::autosp_sites::Site0>(&needs)
                .expect("the emitted schedule");
            Recorder::forward::<serial::autosp_sites::Site0>(&needs).expect("slower, but right");
            assert!(Recorder::forward::<broken::autosp_sites::Site0>(&needs).is_err());
        }
    }
}
