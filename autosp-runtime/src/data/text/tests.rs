use autosp_plan::Settings;

use super::*;
use crate::run_with;

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("autosp-text-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

#[test]
fn folders_are_read_in_order_and_binaries_passed_over() {
    let folder = folder("order");
    for (name, content) in [
        ("b.rs", "bb"),
        ("a.md", "aa"),
        ("binary", "x\0y"),
        (".hidden", "no"),
        ("empty.txt", ""),
    ] {
        fs::write(folder.join(name), content).unwrap();
    }
    fs::write(folder.join("latin1"), [0xE9, 0x20]).unwrap();
    fs::create_dir_all(folder.join("target")).unwrap();
    fs::write(folder.join("target/out.txt"), "no").unwrap();
    fs::create_dir_all(folder.join("aa")).unwrap();
    fs::write(folder.join("aa/c"), "é").unwrap();
    let text = TextData::open(&[&folder]).unwrap();
    assert_eq!(std::str::from_utf8(text.bytes()).unwrap(), "aaébb");
    assert_eq!(text.files(), 4);
    let both = TextData::open(&[folder.join("b.rs"), folder.join("a.md")]).unwrap();
    assert_eq!(both.bytes(), b"bbaa");
}

#[test]
fn what_is_missing_empty_or_no_text_is_refused_with_one_line() {
    let folder = folder("refused");
    fs::write(folder.join("binary"), [1, 0, 2]).unwrap();
    fs::write(folder.join("empty"), "").unwrap();
    let refused = |path: &Path, code, part: &str| {
        let error = TextData::open(&[path]).err().unwrap();
        assert_eq!(error.code(), code);
        assert!(
            error.message().contains(part) && error.message().lines().count() == 1,
            "{error}"
        );
    };
    refused(&folder.join("missing"), codes::FILE_UNREADABLE, "missing");
    refused(&folder.join("binary"), codes::NO_TEXT, "binary");
    refused(&folder.join("empty"), codes::NO_TEXT, "empty");
    refused(&folder, codes::NO_TEXT, "found none");
    assert_eq!(
        TextData::open::<&Path>(&[]).err().unwrap().code(),
        codes::NO_TEXT
    );
}

#[test]
fn batches_are_pieces_of_the_text_that_the_seed_decides() {
    let text = TextData::from_text("the quick brown fox jumps over the lazy dog");
    let draw = |seed, step| {
        text.batch(seed, step, 4, 9)
            .unwrap()
            .to_vec2::<u32>()
            .unwrap()
    };
    assert_eq!(draw(1, 0), draw(1, 0));
    assert_ne!(draw(1, 0), draw(1, 1));
    assert_ne!(draw(1, 0), draw(2, 0));
    let whole = std::str::from_utf8(text.bytes()).unwrap();
    let mut starts = std::collections::BTreeSet::new();
    for step in 0..100 {
        for row in draw(3, step) {
            starts.insert(
                whole
                    .find(&TextData::decode(&row))
                    .expect("a row is a piece of the text"),
            );
        }
    }
    assert!(
        starts.contains(&0) && starts.contains(&(whole.len() - 9)) && starts.len() > 30,
        "{starts:?}"
    );
    assert_eq!(
        text.batch(1, 0, 1, text.len()).unwrap().dims(),
        [1, text.len()]
    );
    assert_eq!(
        text.batch(1, 0, 1, text.len() + 1).unwrap_err().code(),
        codes::TEXT_SHORT
    );
    assert_eq!(
        text.batch(1, 0, 0, 4).unwrap_err().code(),
        codes::BATCH_SHAPE
    );
    assert_eq!(
        text.batch(1, 0, 1, 1).unwrap_err().code(),
        codes::BATCH_SHAPE
    );
}

#[test]
fn text_and_tokens_are_the_same() {
    assert_eq!(TextData::decode(&TextData::encode("füße")), "füße");
    assert_eq!(TextData::decode(&[104, 300]), "h\u{FFFD}");
}

#[test]
fn one_pass_over_a_text_visits_it_in_order() {
    let folder = folder("pass");
    let path = folder.join("book.txt");
    fs::write(&path, "abcdefghijklmnopqrstuvw").unwrap();
    let shards = run_with(Settings::default().with_sp(2).with_dp(2), |sp| {
        let batches = sp
            .text(&path, 5)?
            .map(|batch| Ok(TextData::decode(&batch?.tokens.flatten_all()?.to_vec1()?)));
        batches.collect::<Result<Vec<_>>>()
    });
    assert_eq!(
        shards.unwrap(),
        [
            ["abc", "klm"],
            ["de\0", "no\0"],
            ["fgh", "pqr"],
            ["ij\0", "st\0"]
        ]
    );
    let error = run_with(Settings::default().with_dp(5), |sp| {
        sp.text(&path, 5).map(drop)
    })
    .unwrap_err();
    assert_eq!(error.code(), codes::TEXT_SHORT);
}
