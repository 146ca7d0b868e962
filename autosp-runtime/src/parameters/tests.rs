use candle_core::IndexOp;
use candle_nn::Module;

use super::*;

fn folder(name: &str) -> PathBuf {
    let folder =
        std::env::temp_dir().join(format!("autosp-parameters-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn bits(parameters: &Parameters) -> Vec<(String, Vec<f32>)> {
    let values = |var: Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    parameters
        .all()
        .into_iter()
        .map(|(name, var)| (name, values(var)))
        .collect()
}

fn model(vb: &VarBuilder, reversed: bool) -> candle_core::Result<()> {
    let mut layers = ["b", "a", "c"];
    if reversed {
        layers.reverse();
    }
    for name in layers {
        candle_nn::linear(8, 4, vb.pp(name))?;
    }
    candle_nn::embedding(5, 3, vb.pp("table")).map(drop)
}

#[test]
fn numbers_depend_on_seed_and_name_alone() {
    let build = |seed, reversed| {
        let parameters = Parameters::init(seed, DType::F32, &Device::Cpu);
        model(&parameters.builder(), reversed).unwrap();
        bits(&parameters)
    };
    let first = build(1, false);
    assert_eq!(first, build(1, true));
    assert_ne!(first, build(2, false));
    assert_ne!(
        first[1].1, first[3].1,
        "layers of one shape are drawn apart"
    );
    let names: Vec<_> = first.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "a.bias",
            "a.weight",
            "b.bias",
            "b.weight",
            "c.bias",
            "c.weight",
            "table.weight"
        ]
    );
}

#[test]
fn distributions_are_the_requested_ones() {
    let parameters = Parameters::init(3, DType::F32, &Device::Cpu);
    let vb = parameters.builder();
    let spread = |init| {
        let x = vb
            .get_with_hints((200, 200), &format!("{init:?}"), init)
            .unwrap();
        let mean = x.mean_all().unwrap().to_scalar::<f32>().unwrap();
        let variance = (x
            .sqr()
            .unwrap()
            .mean_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            - mean * mean)
            .max(0.0);
        (mean, variance.sqrt())
    };
    let near = |(mean, deviation): (f32, f32), expected: (f32, f32)| {
        assert!(
            (mean - expected.0).abs() < 0.02 && (deviation - expected.1).abs() < 0.02,
            "{mean} {deviation} {expected:?}"
        );
    };
    near(
        spread(Init::Randn {
            mean: 1.0,
            stdev: 0.5,
        }),
        (1.0, 0.5),
    );
    near(
        spread(Init::Uniform { lo: 0.0, up: 1.0 }),
        (0.5, 12_f32.sqrt().recip()),
    );
    near(spread(candle_nn::init::DEFAULT_KAIMING_NORMAL), (0.0, 0.1));
    near(spread(candle_nn::init::DEFAULT_KAIMING_UNIFORM), (0.0, 0.1));
    near(spread(Init::Const(0.25)), (0.25, 0.0));
}

#[test]
fn one_name_is_one_variable_in_any_type() {
    let parameters = Parameters::init(3, DType::F32, &Device::Cpu);
    let vb = parameters.builder();
    let a = vb.get_with_hints((2, 2), "w", Init::Const(1.0)).unwrap();
    let b = vb
        .get_with_hints_dtype((2, 2), "w", Init::Const(1.0), DType::F64)
        .unwrap();
    let loss = (a.to_dtype(DType::F64).unwrap() + b)
        .unwrap()
        .sum_all()
        .unwrap();
    let var = &parameters.vars()[0];
    let grad = loss
        .backward()
        .unwrap()
        .get(var)
        .unwrap()
        .to_vec2::<f32>()
        .unwrap();
    assert_eq!(grad, [[2.0, 2.0], [2.0, 2.0]]);
    let error = Error::from(vb.get((3, 2), "w").unwrap_err());
    assert_eq!(error.code(), codes::TENSOR_SHAPE);
}

#[test]
fn frozen_tensors_are_constants_and_are_saved() {
    let folder = folder("frozen");
    let parameters =
        Parameters::init(1, DType::F32, &Device::Cpu).freeze(|name| name.ends_with("bias"));
    let layer = candle_nn::linear(4, 2, parameters.builder()).unwrap();
    let x = Tensor::ones((1, 4), DType::F32, &Device::Cpu).unwrap();
    let grads = layer
        .forward(&x)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert!(grads.get(layer.weight()).is_some());
    assert!(!layer.bias().unwrap().track_op());
    assert_eq!(parameters.named().len(), 1);
    let path = folder.join("model.safetensors");
    parameters.save(&path).unwrap();
    let loaded = load_trainable(&[&path], DType::F32, &Device::Cpu).unwrap();
    candle_nn::linear(4, 2, loaded.builder()).unwrap();
    assert_eq!(bits(&parameters), bits(&loaded));
}

#[test]
fn what_is_saved_loads_back_and_replaces_what_was_there() {
    let folder = folder("save");
    let path = folder.join("model.safetensors");
    fs::write(&path, "older").unwrap();
    let parameters = Parameters::init(5, DType::F32, &Device::Cpu);
    model(&parameters.builder(), false).unwrap();
    parameters.save(&path).unwrap();
    let loaded = load_trainable(&[&path], DType::F32, &Device::Cpu).unwrap();
    model(&loaded.builder(), false).unwrap();
    assert_eq!(bits(&parameters), bits(&loaded));
    // Saving over the mapped file leaves both readable.
    loaded.vars()[0]
        .set(&Tensor::ones(4, DType::F32, &Device::Cpu).unwrap())
        .unwrap();
    loaded.save(&path).unwrap();
    let again = load_trainable(&[&path], DType::F32, &Device::Cpu).unwrap();
    let first = again
        .builder()
        .get(4, "a.bias")
        .unwrap()
        .i(0)
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    assert!((first - 1.0).abs() < f32::EPSILON);
    assert_eq!(
        fs::read_dir(&folder).unwrap().count(),
        1,
        "no temporary file is left"
    );
}

#[test]
fn files_that_do_not_fit_are_refused_with_one_line() {
    let folder = folder("refused");
    let (missing, broken, good) = (
        folder.join("missing"),
        folder.join("broken"),
        folder.join("good"),
    );
    fs::write(&broken, "not a model").unwrap();
    let parameters = Parameters::init(5, DType::F32, &Device::Cpu);
    candle_nn::linear(4, 2, parameters.builder()).unwrap();
    parameters.save(&good).unwrap();
    let load = |path: &Path| load_trainable(&[path], DType::F32, &Device::Cpu);
    let refused = |error: Error, code, part: &str| {
        assert_eq!(error.code(), code, "{error}");
        assert!(
            error.message().contains(part) && error.message().lines().count() == 1,
            "{error}"
        );
    };
    refused(
        load(&missing).err().unwrap(),
        codes::FILE_UNREADABLE,
        "missing",
    );
    refused(
        load(&folder).err().unwrap(),
        codes::FILE_UNREADABLE,
        "folder",
    );
    refused(load(&broken).err().unwrap(), codes::FILE_BROKEN, "broken");
    refused(
        load_trainable::<&Path>(&[], DType::F32, &Device::Cpu)
            .err()
            .unwrap(),
        codes::FILE_UNREADABLE,
        "at least one",
    );
    let vb = load(&good).unwrap().builder();
    refused(
        vb.get(4, "other").unwrap_err().into(),
        codes::TENSOR_MISSING,
        "`other`",
    );
    refused(
        vb.get(5, "bias").unwrap_err().into(),
        codes::TENSOR_SHAPE,
        "`bias`",
    );
    refused(
        parameters.save(&folder).unwrap_err(),
        codes::FILE_UNWRITABLE,
        "folder",
    );
    refused(
        parameters.save(folder.join("no/such/file")).unwrap_err(),
        codes::FILE_UNWRITABLE,
        "no/such/file",
    );
}
