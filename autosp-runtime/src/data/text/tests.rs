use std::fs;
use std::path::PathBuf;

use autosp_plan::Settings;
use proptest::prelude::*;

use super::super::VOCABULARY;
use super::*;
use crate::run_with;

fn of(documents: &[&str], packing: Packing) -> TextData {
    let tokens = documents
        .iter()
        .map(|text| Tokenizer::bytes().encode(text).unwrap());
    TextReader::new()
        .packing(packing)
        .documents(tokens)
        .unwrap()
}

fn decoded(tokens: &[u32]) -> String {
    Tokenizer::bytes().decode(tokens).unwrap()
}

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
    assert_eq!(decoded(&text.tokens(0..99)), "aaébb");
    // The empty file is no document.
    assert_eq!((text.files(), text.documents()), (4, 3));
    assert_eq!(
        text.document(1).map(|tokens| decoded(&tokens)).as_deref(),
        Some("é")
    );
    assert_eq!(text.document(3), None);
    let both = TextData::open(&[folder.join("b.rs"), folder.join("a.md")]).unwrap();
    assert_eq!(decoded(&both.tokens(0..9)), "bbaa");
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
    let whole = decoded(&text.tokens(0..text.len()));
    let mut starts = std::collections::BTreeSet::new();
    for step in 0..100 {
        for row in draw(3, step) {
            starts.insert(
                whole
                    .find(&decoded(&row))
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
fn one_pass_over_a_text_visits_it_in_order() {
    let folder = folder("pass");
    let path = folder.join("book.txt");
    fs::write(&path, "abcdefghijklmnopqrstuvw").unwrap();
    let shards = run_with(Settings::default().with_sp(2).with_dp(2), |sp| {
        let batches = sp
            .text(&path, 5)?
            .map(|batch| Ok(decoded(&batch?.tokens.flatten_all()?.to_vec1()?)));
        batches.collect::<Result<Vec<_>>>()
    });
    assert_eq!(
        shards.unwrap(),
        [
            ["abc", "klm", "uvw"],
            ["de\0", "no\0", "\0\0\0"],
            ["fgh", "pqr", "\0\0\0"],
            ["ij\0", "st\0", "\0\0\0"]
        ]
    );
    let labels = run_with(Settings::default().with_dp(2), |sp| {
        let last = sp.text(&path, 5)?.last().unwrap()?;
        Ok(last.labels.flatten_all()?.to_vec1::<i64>()?)
    });
    let ignored = vec![IGNORE; 5];
    assert_eq!(
        labels.unwrap(),
        [vec![118, 119, IGNORE, IGNORE, IGNORE], ignored]
    );
    let error = run_with(Settings::default(), |sp| sp.text(&path, 24).map(drop)).unwrap_err();
    assert_eq!(error.code(), codes::TEXT_SHORT);
}

#[test]
fn a_pass_visits_each_document_and_every_token_once() {
    let documents = ["abcdefg", "h", "ijklm", "nopqrstuvw"];
    for (packing, expected) in [
        (
            Packing::Pad,
            vec!["abcd", "efg", "ijkl", "nopq", "rstu", "vw"],
        ),
        (
            Packing::Cross,
            vec!["abcd", "efgh", "ijkl", "mnop", "qrst", "uvw"],
        ),
    ] {
        let text = of(&documents, packing);
        let found: Vec<String> = text
            .pieces(4)
            .into_iter()
            .map(|piece| decoded(&text.tokens(piece)))
            .collect();
        // `h`, and the `m` that was left of a document, predict nothing.
        assert_eq!(found, expected, "{packing:?}");
    }
}

#[test]
fn a_row_is_one_document_unless_the_crossing_is_asked_for() {
    let documents = ["aaaaaaaaaaaa", "bbbbbbbb", "cc", "d"];
    let text = of(&documents, Packing::Pad);
    let mut drawn = std::collections::BTreeMap::new();
    for step in 0..50 {
        let (tokens, labels) = text.labelled_batch(1, step, 4, 6).unwrap();
        let (tokens, labels) = (
            tokens.to_vec2::<u32>().unwrap(),
            labels.to_vec2::<i64>().unwrap(),
        );
        for (row, labels) in tokens.iter().zip(labels) {
            let text = decoded(row);
            let valid = text.trim_end_matches('\0').len();
            assert!(
                documents
                    .iter()
                    .any(|document| document.contains(&text[..valid])),
                "{text:?}"
            );
            assert_eq!(valid, if row[0] == 99 { 2 } else { 6 });
            for (i, &label) in labels.iter().enumerate() {
                assert_eq!(label, if i < valid { i64::from(row[i]) } else { IGNORE });
            }
            *drawn.entry(row[0]).or_insert(0) += 1;
        }
    }
    // By tokens: 12, 8 and 2 of 22, where the last takes the turn of the single one and hands it on.
    assert!(
        drawn[&97] > drawn[&98] && drawn[&98] > drawn[&99] && drawn.len() == 3,
        "{drawn:?}"
    );
    let error = text.batch(1, 0, 1, 6).unwrap_err();
    assert_eq!(error.code(), codes::DOCUMENT_SHORT, "{error}");
    let error = text.labelled_batch(1, 0, 1, 13).unwrap_err();
    assert_eq!(
        (error.code(), error.help()),
        (codes::TEXT_SHORT, Some("--seq-len 12"))
    );
    let crossing = of(&documents, Packing::Cross);
    let rows = crossing
        .batch(1, 0, 20, 13)
        .unwrap()
        .to_vec2::<u32>()
        .unwrap();
    assert!(
        rows.iter()
            .all(|row| row.contains(&97) && row.contains(&98))
    );
    assert!(crossing.batch(1, 0, 1, 23).is_ok() && crossing.batch(1, 0, 1, 24).is_err());
}

proptest! {
    /// Whatever the documents: rows hold one document each, all of a short one, and labels say what is padding.
    #[test]
    fn rows_are_pieces_of_documents(
        lengths in proptest::collection::vec(1usize..30, 1..12),
        seq_len in 2usize..20,
        step in 0u64..1000,
    ) {
        // Token 256 * document + place: beyond a byte, and different everywhere.
        let documents = lengths.iter().enumerate().map(|(i, &n)| (0..n).map(|j| (VOCABULARY * (i + 1) + j) as u32).collect::<Vec<_>>());
        let text = TextReader::new().documents(documents).unwrap();
        prop_assert_eq!(text.documents(), lengths.len());
        match text.labelled_batch(3, step, 3, seq_len) {
            Err(error) => {
                prop_assert_eq!(error.code(), codes::TEXT_SHORT);
                prop_assert!(lengths.iter().all(|&n| n < seq_len));
            }
            Ok((tokens, labels)) => {
                let rows = tokens.to_vec2::<u32>().unwrap().into_iter().zip(labels.to_vec2::<i64>().unwrap());
                for (row, labels) in rows {
                    let document = row[0] as usize / VOCABULARY - 1;
                    let valid = lengths[document].min(seq_len);
                    prop_assert!(valid > 1);
                    for i in 0..seq_len {
                        let expected = if i < valid { row[0] + i as u32 } else { 0 };
                        prop_assert_eq!(row[i], expected);
                        prop_assert_eq!(labels[i], if i < valid { i64::from(expected) } else { IGNORE });
                    }
                }
            }
        }
    }
}
