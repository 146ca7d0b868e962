use std::collections::HashMap;

use serde_json::json;

use crate::{Parameters, Settings, TrainSettings, Trainer, load_trainable, run_with};

use super::*;

fn folder(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("autosp-files-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

/// Writes tensors of one number each.
fn write(path: &Path, tensors: &[(&str, f32)]) {
    let tensors: HashMap<String, Tensor> = tensors
        .iter()
        .map(|&(name, x)| (name.to_owned(), Tensor::new(&[x], &Device::Cpu).unwrap()))
        .collect();
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// A model of two files with their index.
fn sharded(name: &str) -> PathBuf {
    let folder = folder(name);
    write(
        &folder.join("model-1.safetensors"),
        &[("a", 1.0), ("b", 2.0)],
    );
    write(&folder.join("model-2.safetensors"), &[("c", 3.0)]);
    let index = json!({"metadata": {"total_size": 12}, "weight_map": {
        "a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}});
    fs::write(folder.join(INDEX), index.to_string()).unwrap();
    folder
}

fn load(path: &Path) -> Result<Parameters> {
    load_trainable(&[path], DType::F32, &Device::Cpu)
}

fn value(parameters: &Parameters, name: &str) -> f32 {
    let x = parameters.builder().get(1, name).unwrap();
    x.to_vec1::<f32>().unwrap()[0]
}

fn refused(result: Result<Parameters>, code: codes::Code, parts: &[&str]) {
    let error = result.err().expect("it is refused");
    assert_eq!(error.code(), code, "{error}");
    for part in parts {
        assert!(error.message().contains(part), "{part}: {error}");
    }
    assert_eq!(error.message().lines().count(), 1, "{error}");
}

#[test]
fn a_folder_its_index_and_its_files_are_one_model() {
    let folder = sharded("same");
    let files = [
        folder.join("model-1.safetensors"),
        folder.join("model-2.safetensors"),
    ];
    for parameters in [
        load(&folder).unwrap(),
        load(&folder.join(INDEX)).unwrap(),
        load_trainable(&files, DType::F32, &Device::Cpu).unwrap(),
    ] {
        assert_eq!(
            ["a", "b", "c"].map(|name| value(&parameters, name).to_bits()),
            [1f32, 2.0, 3.0].map(f32::to_bits)
        );
        assert!(parameters.unused().is_empty());
    }
    let single = self::folder("single");
    write(&single.join(SINGLE), &[("a", 4.0)]);
    assert_eq!(
        value(&load(&single).unwrap(), "a").to_bits(),
        4f32.to_bits()
    );
    refused(
        load(&self::folder("nothing")),
        codes::FILE_UNREADABLE,
        &["nothing", "found neither"],
    );
}

#[test]
fn an_index_is_held_against_its_files() {
    let index = |name: &str, change: &dyn Fn(&Path, &mut Value)| {
        let folder = sharded(name);
        let mut json: Value =
            serde_json::from_str(&fs::read_to_string(folder.join(INDEX)).unwrap()).unwrap();
        change(&folder, &mut json);
        fs::write(folder.join(INDEX), json.to_string()).unwrap();
        load(&folder)
    };
    refused(
        index("absent", &|_, json| {
            json["weight_map"]["d"] = json!("model-2.safetensors");
        }),
        codes::INDEX,
        &[INDEX, "`d`", "model-2.safetensors", "found none"],
    );
    refused(
        index("elsewhere", &|_, json| {
            json["weight_map"]["b"] = json!("model-2.safetensors");
        }),
        codes::INDEX,
        &["expected `b`", "model-2", "model-1"],
    );
    refused(
        index("unlisted", &|_, json| {
            drop(json["weight_map"].as_object_mut().unwrap().remove("a"));
        }),
        codes::INDEX,
        &["found `a`", "model-1"],
    );
    refused(
        index("no-file", &|folder, _| {
            fs::remove_file(folder.join("model-2.safetensors")).unwrap();
        }),
        codes::FILE_UNREADABLE,
        &["model-2.safetensors"],
    );
    for file in [
        "../model-2.safetensors",
        "/etc/model.safetensors",
        "x/y.safetensors",
        "..",
    ] {
        refused(
            index("outside", &|_, json| json["weight_map"]["c"] = json!(file)),
            codes::INDEX,
            &["beside the index", file],
        );
    }
    refused(
        index("number", &|_, json| json["weight_map"]["c"] = json!(3)),
        codes::INDEX,
        &["`c`", "found 3"],
    );
    refused(
        index("no-map", &|_, json| *json = json!({"a": 1})),
        codes::INDEX,
        &["weight_map"],
    );
    refused(
        index("empty", &|_, json| json["weight_map"] = json!({})),
        codes::INDEX,
        &["at least one"],
    );
    let folder = sharded("broken-index");
    fs::write(folder.join(INDEX), "{\"weight_map\": {").unwrap();
    refused(load(&folder), codes::INDEX, &["line 1 column 16"]);
}

#[test]
fn a_tensor_is_in_one_file() {
    let folder = sharded("twice");
    write(
        &folder.join("model-2.safetensors"),
        &[("c", 3.0), ("a", 5.0)],
    );
    refused(
        load(&folder),
        codes::TENSOR_TWICE,
        &["`a`", "model-1.safetensors", "model-2.safetensors"],
    );
    let file = folder.join("model-1.safetensors");
    refused(
        load_trainable(&[&file, &file], DType::F32, &Device::Cpu),
        codes::TENSOR_TWICE,
        &["model-1.safetensors"],
    );
}

#[test]
fn a_file_that_was_cut_short_anywhere_is_refused() {
    let folder = sharded("cut");
    let path = folder.join("model-2.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        refused(load(&folder), codes::FILE_BROKEN, &["model-2.safetensors"]);
    }
    fs::write(&path, &whole).unwrap();
    assert!(load(&folder).is_ok());
}

#[test]
fn types_that_cannot_be_trained_are_refused() {
    let folder = folder("types");
    let path = folder.join(SINGLE);
    let tensors = HashMap::from([
        (
            "ids".to_owned(),
            Tensor::new(&[1i64], &Device::Cpu).unwrap(),
        ),
        (
            "half".to_owned(),
            Tensor::new(&[0.5f32], &Device::Cpu)
                .unwrap()
                .to_dtype(DType::BF16)
                .unwrap(),
        ),
    ]);
    candle_core::safetensors::save(&tensors, &path).unwrap();
    let parameters = load(&folder).unwrap();
    let error = Error::from(parameters.builder().get(1, "ids").unwrap_err());
    assert_eq!(error.code(), codes::TENSOR_DTYPE);
    assert!(
        error.message().contains("`ids`") && error.message().contains("types"),
        "{error}"
    );
    assert_eq!(value(&parameters, "half").to_bits(), 0.5f32.to_bits());
    // Whole numbers are no parameters, and so none that the model forgot.
    assert!(parameters.unused().is_empty());
    refused(
        load_trainable(&[&path], DType::U32, &Device::Cpu),
        codes::TENSOR_DTYPE,
        &["U32"],
    );
}

#[test]
fn what_the_model_does_not_use_is_no_accident() {
    let folder = sharded("extra");
    let train = |ignored: &'static str| {
        run_with(Settings::default(), |sp| {
            let parameters = load(&folder)?.ignore(move |name| name == ignored);
            parameters.builder().get(1, "a")?;
            parameters.builder().get(1, "b")?;
            Trainer::new(sp, parameters, TrainSettings::default()).map(drop)
        })
    };
    let error = train("b").unwrap_err();
    assert_eq!(error.code(), codes::TENSOR_EXTRA, "{error}");
    assert!(
        error.message().contains("`c`") && error.message().contains("model-2.safetensors"),
        "{error}"
    );
    assert_eq!(
        error.help(),
        Some("parameters.ignore(|name| name == \"c\")")
    );
    train("c").unwrap();
}
