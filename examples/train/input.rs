//! What the program reads: text in one of several forms, and the configuration of the model.

use std::path::{Path, PathBuf};

use autosp::{
    Error, ModelConfig, Packing, Result, TextData, TextReader, Tokenizer, codes, data::TokenWidth,
};

use crate::{
    PROMPT, SAMPLE, failure, llama,
    options::{Documents, Options},
};

/// What is read where no text is named: this workspace.
const WORKSPACE: &[&str] = &[
    "README.md",
    "docs",
    "src",
    "autosp-macros",
    "autosp-compiler",
    "autosp-plan",
    "autosp-runtime",
    "cargo-autosp",
    "examples",
];

/// The text that the options name.
///
/// # Errors
/// What cannot be read, and forms that contradict each other.
pub fn text(options: &Options) -> Result<TextData> {
    let mut reader = TextReader::new();
    if let Some(path) = &options.tokenizer {
        reader = reader.tokenizer(Tokenizer::open(path)?);
    }
    if let Some(folder) = &options.model {
        reader = reader.vocabulary(ModelConfig::open(folder)?.vocab_size);
    }
    if options.documents == Documents::Cross {
        reader = reader.packing(Packing::Cross);
    }
    let text = if let Some(width) = options.token_width {
        let width = if width == 16 {
            TokenWidth::U16
        } else {
            TokenWidth::U32
        };
        reader.tokens(&options.data, width)?
    } else if let Some(field) = &options.json_field {
        reader.json_lines(&options.data, field)?
    } else if options.data.is_empty() {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR"));
        let paths: Vec<PathBuf> = WORKSPACE.iter().map(|name| workspace.join(name)).collect();
        reader.text(&paths)?
    } else {
        reader.text(&options.data)?
    };
    if text.packing() == Packing::Cross && text.documents() > 1 {
        eprintln!(
            "warning: attention crosses the {} documents of the text; --documents pad keeps them apart",
            text.documents()
        );
    }
    Ok(text)
}

/// The Llama of `--model`, or a small one over the tokens of the text.
///
/// # Errors
/// A model that is no Llama as `models/llama.rs` writes it.
pub fn config(options: &Options, text: &TextData) -> Result<llama::Config> {
    let Some(folder) = &options.model else {
        let largest = text.tokens(0..text.len()).into_iter().max().unwrap_or(0) as usize;
        return Ok(llama::Config {
            vocab_size: text.tokenizer().vocabulary().max(largest + 1),
            hidden_size: 128,
            intermediate_size: 352,
            num_hidden_layers: 4,
            num_attention_heads: 8,
            num_key_value_heads: 4,
            head_dim: None,
            max_position_embeddings: options.seq_len.max(PROMPT + SAMPLE),
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: false,
            last_token_only: false,
        });
    };
    let config = ModelConfig::open(folder)?;
    let refuse = |what: String| {
        let text = format!("`{}`: {what}", folder.display());
        Error::new(codes::CONFIG, text)
    };
    let rope = config.rope.unwrap_or_default();
    if config.model_type != "llama" || config.attention_bias || config.mlp_bias {
        return Err(refuse(format!(
            "expected a Llama without biases, found `{}`",
            config.model_type
        )));
    }
    if rope.kind != "default" || rope.partial_rotary_factor < 1.0 {
        return Err(refuse(format!(
            "expected rotary positions without scaling, found `{}`",
            rope.kind
        )));
    }
    if options.seq_len > config.max_position_embeddings {
        return Err(failure(format!(
            "expected --seq-len of at most {}, for which the model was made, found {}",
            config.max_position_embeddings, options.seq_len
        )));
    }
    Ok(llama::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        head_dim: Some(config.head_dim),
        max_position_embeddings: config.max_position_embeddings,
        rope_theta: rope.theta as _,
        rms_norm_eps: config.norm_eps,
        tie_word_embeddings: config.tie_word_embeddings.unwrap_or(false),
        last_token_only: false,
    })
}
