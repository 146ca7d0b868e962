use serde_json::json;

use super::*;

/// Words, with a token before each text, and with a truncation that would lose most of it.
pub(in crate::data) fn words() -> String {
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "<s>"},
        "added_tokens": [special(0, "<s>"), special(1, "</s>"), special(500, "<late>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "<unk>": 2, "one": 3, "two": 4, "three": 300, "<late>": 500},
            "unk_token": "<unk>"},
    })
    .to_string()
}

/// A folder with `tokenizer.json` in it.
pub(in crate::data) fn folder(name: &str, text: &str) -> std::path::PathBuf {
    let folder =
        std::env::temp_dir().join(format!("autosp-tokenizer-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("tokenizer.json"), text).unwrap();
    folder
}

#[test]
fn a_text_is_taken_whole_whatever_the_file_says() {
    let folder = folder("whole", &words());
    for path in [folder.clone(), folder.join("tokenizer.json")] {
        let tokenizer = Tokenizer::open(path).unwrap();
        assert_eq!(
            tokenizer.encode("one two three four").unwrap(),
            [0, 3, 4, 300, 2]
        );
        assert_eq!(tokenizer.decode(&[0, 3, 300]).unwrap(), "one three");
        // Ids have gaps.
        assert_eq!(tokenizer.vocabulary(), 501);
        assert_eq!(tokenizer.token("</s>").unwrap(), 1);
        assert_eq!(
            tokenizer.token("<pad>").unwrap_err().code(),
            codes::TOKENIZER
        );
    }
}

#[test]
fn what_is_no_tokenizer_is_refused_with_its_name() {
    let folder = folder("broken", "{\"model\": 3}");
    let error = Tokenizer::open(&folder).unwrap_err();
    assert_eq!(error.code(), codes::TOKENIZER);
    assert!(
        error.message().contains("tokenizer.json") && error.message().lines().count() == 1,
        "{error}"
    );
    let error = Tokenizer::open(folder.join("none")).unwrap_err();
    assert_eq!(error.code(), codes::FILE_UNREADABLE);
}

#[test]
fn bytes_have_no_special_tokens() {
    let bytes = Tokenizer::bytes();
    assert_eq!(
        bytes.decode(&bytes.encode("füße").unwrap()).unwrap(),
        "füße"
    );
    assert_eq!(bytes.decode(&[104, 300]).unwrap(), "h\u{FFFD}");
    assert_eq!(bytes.vocabulary(), 256);
    assert_eq!(bytes.token("<s>").unwrap_err().code(), codes::TOKENIZER);
}
