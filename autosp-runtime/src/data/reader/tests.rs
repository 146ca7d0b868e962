use std::fs;
use std::path::PathBuf;

use super::super::tokenizer::tests as tokenizer;
use super::*;

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("autosp-reader-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn all(text: &TextData) -> Vec<Vec<u32>> {
    (0..text.documents())
        .map(|i| text.document(i).unwrap())
        .collect()
}

#[test]
fn each_way_of_reading_gives_the_same_documents() {
    let folder = folder("ways");
    let words = Tokenizer::open(tokenizer::folder("reader", &tokenizer::words())).unwrap();
    let reader = TextReader::new()
        .end_token(words.token("</s>").unwrap())
        .tokenizer(words);
    let expected = [vec![0, 3, 4, 1], vec![0, 300, 1]];

    fs::write(folder.join("a.txt"), "one two\n").unwrap();
    fs::write(folder.join("b.txt"), "three").unwrap();
    let text = reader
        .text(&[folder.join("a.txt"), folder.join("b.txt")])
        .unwrap();
    assert_eq!((all(&text), text.files()), (expected.to_vec(), 2));

    let lines = "{\"text\": \"one two\", \"id\": 1}\n\n{\"id\": 2, \"text\": \"three\"}\r\n{\"text\": \"\"}";
    fs::write(folder.join("c.jsonl"), lines).unwrap();
    // In a folder, other files are passed over.
    let text = reader.json_lines(&[&folder], "text").unwrap();
    // An empty text is a document of the tokens around it.
    assert_eq!(all(&text)[..2], expected);
    assert_eq!((all(&text)[2].as_slice(), text.files()), (&[0, 1][..], 1));

    let numbers = [0u32, 3, 4, 1, 0, 300, 1];
    let short: Vec<u8> = numbers
        .iter()
        .flat_map(|&n| (n as u16).to_le_bytes())
        .collect();
    let long: Vec<u8> = numbers.iter().flat_map(|&n| n.to_le_bytes()).collect();
    for (bytes, width) in [(short, TokenWidth::U16), (long, TokenWidth::U32)] {
        let path = folder.join("tokens.bin");
        fs::write(&path, bytes).unwrap();
        assert_eq!(all(&reader.tokens(&[&path], width).unwrap()), expected);
        let whole = TextReader::new().tokens(&[&path], width).unwrap();
        assert_eq!(all(&whole), [numbers.to_vec()]);
    }
    let text = reader.documents([[0, 3, 4].as_slice(), &[0, 300]]).unwrap();
    assert_eq!(all(&text), expected);
}

#[test]
fn bytes_take_an_end_token_too() {
    let folder = folder("bytes");
    fs::write(folder.join("a"), "ab").unwrap();
    fs::write(folder.join("b"), "c").unwrap();
    let text = TextReader::new().end_token(256).text(&[&folder]).unwrap();
    assert_eq!(all(&text), [vec![97, 98, 256], vec![99, 256]]);
}

#[test]
fn bytes_are_held_to_the_vocabulary_too() {
    let folder = folder("small");
    fs::write(folder.join("a"), "ab").unwrap();
    let read = |tokens| TextReader::new().vocabulary(tokens).text(&[&folder]);
    assert_eq!(all(&read(99).unwrap()), [vec![97, 98]]);
    assert_eq!(read(98).err().unwrap().code(), codes::TOKEN_FILE);
}

#[test]
fn a_line_that_cannot_be_used_is_named() {
    let folder = folder("lines");
    let path = folder.join("x.jsonl");
    for (line, part) in [
        ("{\"text\": }", "x.jsonl:2: column 10: expected value"),
        (
            "{\"text\": 3}",
            "x.jsonl:2: expected a string in `text`, found a number",
        ),
        (
            "{\"content\": \"a\", \"id\": 3}",
            "x.jsonl:2: expected a field `text`, found `content`, `id`",
        ),
        ("{}", "x.jsonl:2: expected a field `text`, found none"),
        (
            "[\"a\"]",
            "x.jsonl:2: expected a field `text`, found an array",
        ),
        ("{\"text\": \"cut", "x.jsonl:2: column 13"),
    ] {
        fs::write(&path, format!("{{\"text\": \"good\"}}\n{line}\n")).unwrap();
        let error = TextReader::new()
            .json_lines(&[&path], "text")
            .err()
            .unwrap();
        assert_eq!(error.code(), codes::DATA_LINE);
        assert!(error.message().contains(part), "{part}: {error}");
    }
    fs::write(&path, "\n \n").unwrap();
    let error = TextReader::new()
        .json_lines(&[&path], "text")
        .err()
        .unwrap();
    assert_eq!(error.code(), codes::NO_TEXT);
}

#[test]
fn tokens_that_cannot_be_are_refused() {
    let folder = folder("tokens");
    let path = folder.join("x.bin");
    let read = |bytes: &[u8], width| {
        fs::write(&path, bytes).unwrap();
        TextReader::new().vocabulary(300).tokens(&[&path], width)
    };
    assert!(read(&[43, 1], TokenWidth::U16).is_ok());
    for (bytes, width, part) in [
        (
            &[1, 2, 3][..],
            TokenWidth::U16,
            "tokens of 2 bytes, found 3 bytes",
        ),
        (
            &[1, 2, 3, 4, 5, 6],
            TokenWidth::U32,
            "tokens of 4 bytes, found 6 bytes",
        ),
        (&[], TokenWidth::U32, "found 0 bytes"),
        (
            &[44, 1],
            TokenWidth::U16,
            "below 300, the size of the vocabulary, found 300",
        ),
    ] {
        let error = read(bytes, width).err().unwrap();
        assert_eq!(error.code(), codes::TOKEN_FILE);
        assert!(
            error.message().contains(part) && error.message().contains("x.bin"),
            "{error}"
        );
    }
    let error = TextReader::new()
        .tokens(&[folder.join("none")], TokenWidth::U16)
        .err()
        .unwrap();
    assert_eq!(error.code(), codes::FILE_UNREADABLE);
    let error = TextReader::new().documents([[]]).err().unwrap();
    assert_eq!(error.code(), codes::NO_TEXT);
}
