//! One model on one device and on meshes.

use std::collections::BTreeMap;

use autosp::loss::{cross_entropy, IGNORE};
use autosp::{Parameters, Settings};
use autosp_reference::{global_norm, gradients, Tensors, Variables};
use candle::{DType, Device, Result, Tensor};
use candle_nn::VarBuilder;
use serde_json::Value;

use crate::numbers::{tokens, variables};

/// Makes a model and calls it: config, variables, tokens `[b, s]`.
pub type Model = fn(&Value, VarBuilder, &Tensor) -> Result<Tensor>;

/// The same with the labels `[b, s]`, to a scalar.
pub type Loss = fn(&Value, VarBuilder, &Tensor, &Tensor) -> Result<Tensor>;

/// What a model gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A row for each token, `[b, s, width]`.
    Tokens,
    /// A row for the last token, `[b, width]` or `[b, 1, width]`.
    Last,
}

/// One line of the zoo.
#[derive(Debug, Clone)]
pub struct Zoo {
    /// What the model is made from.
    pub config: Value,
    /// Changes to the config, each of which has to change the result: a feature that could be left out is not tested.
    pub off: Vec<Value>,
    /// What comes out.
    pub kind: Kind,
    /// Variables that get no gradient on one device either, because the model's own code detaches them.
    pub detached: Vec<&'static str>,
    /// Variables that a token may have no use for, such as experts that it is not sent to.
    pub sparse: Vec<&'static str>,
    /// Whether candle runs the file as it stands, with its caches and fused operations.
    pub original: bool,
    /// Tokens of a sequence.
    pub seq_len: usize,
    /// Tokens are below this; at most the width of the result.
    pub vocabulary: usize,
    /// Rows of the batch.
    pub rows: usize,
}

impl Default for Zoo {
    fn default() -> Self {
        Self {
            config: Value::Null,
            off: Vec::new(),
            kind: Kind::Tokens,
            detached: Vec::new(),
            sparse: Vec::new(),
            original: true,
            // Neither two nor four ranks divide it, and it is more than three windows of 5.
            seq_len: 19,
            vocabulary: 24,
            rows: 2,
        }
    }
}

/// Result, loss and gradients of one run.
struct Found {
    out: Tensor,
    loss: f64,
    gradients: Tensors,
}

impl Zoo {
    /// Everything that is asked of a model.
    ///
    /// # Panics
    /// With what differs.
    pub fn check(&self, name: &str, annotated: Model, plain: Model) {
        let start = self.start(plain);
        let tokens = tokens(self.rows, self.seq_len, self.vocabulary, 3);
        let expected = self
            .on_one(&start, plain, &tokens)
            .unwrap_or_else(|e| panic!("{name}, one device: {e}"));
        self.no_part_is_idle(name, plain, &tokens, &expected);
        self.all_get_gradients(name, &expected);
        if self.original {
            self.the_original_runs(name, &start, annotated, &tokens, &expected);
        }
        for sp in [1, 2, 4] {
            let found = self
                .on_ranks(&start, annotated, &tokens, sp)
                .unwrap_or_else(|e| panic!("{name}, sp {sp}: {e}"));
            self.compare(&format!("{name}, sp {sp}"), &found, &expected);
        }
        // What is detached changes the result all the same, so that the gradient is not the slope.
        if self.detached.is_empty() {
            self.slopes(name, &start, plain, &tokens, &expected);
        }
    }

    /// The loss over all tokens and its gradients.
    ///
    /// # Panics
    /// With what differs.
    pub fn check_loss(&self, name: &str, annotated: Loss, plain: Model) {
        let start = self.start(plain);
        let tokens = tokens(self.rows, self.seq_len, self.vocabulary, 3);
        let expected = self
            .every_beginning(&start, plain, &tokens)
            .unwrap_or_else(|e| panic!("{name}, one device: {e}"));
        for sp in [1, 2, 4] {
            let labels = self.labels(&tokens).expect("labels");
            // A few tokens at a time.
            let settings = Settings::default().with_sp(sp).with_loss_bytes(600);
            let found = autosp::run_with(settings, |sp| {
                let vars = autosp_reference::variables(&start)?;
                let batch = sp.shard_targets(&tokens, &labels)?;
                let (loss, mut store) = sp.scope(|| -> autosp::Result<_> {
                    let loss =
                        annotated(&self.config, builder(&vars), &batch.tokens, &batch.labels)?;
                    Ok((loss.detach(), loss.backward()?))
                })?;
                let gradients = reduced(sp, &vars, &mut store)?;
                Ok(Found {
                    out: loss.clone(),
                    loss: scalar(&loss)?,
                    gradients,
                })
            });
            let found = found
                .unwrap_or_else(|e| panic!("{name}, sp {sp}: {e}"))
                .swap_remove(0);
            self.compare(&format!("{name}, sp {sp}"), &found, &expected);
        }
    }

    /// A mutant of a model: ranks give what one device gives, and where it means something else, not what the original gives.
    ///
    /// # Panics
    /// With what differs, or does not.
    pub fn check_mutant(
        &self,
        name: &str,
        annotated: Model,
        plain: Model,
        original: Option<Model>,
    ) {
        let start = self.start(plain);
        let tokens = tokens(self.rows, self.seq_len, self.vocabulary, 3);
        let on_one = |model: Model| {
            let found = self.on_one(&start, model, &tokens);
            found.unwrap_or_else(|e| panic!("{name}, one device: {e}"))
        };
        let expected = on_one(plain);
        if let Some(original) = original {
            let other = (on_one(original).out - &expected.out).expect("the same shape");
            let apart = other.abs().and_then(|d| d.max_all()?.to_scalar::<f32>());
            assert!(apart.is_ok_and(|d| d > 1e-3), "{name} changes nothing");
        }
        for sp in [2, 4] {
            let found = self
                .on_ranks(&start, annotated, &tokens, sp)
                .unwrap_or_else(|e| panic!("{name}, sp {sp}: {e}"));
            self.compare(&format!("{name}, sp {sp}"), &found, &expected);
        }
    }

    /// The plain model's last row after every beginning of the sequence.
    fn every_beginning(&self, start: &Tensors, plain: Model, tokens: &Tensor) -> Result<Found> {
        let vars = autosp_reference::variables(start)?;
        let rows: Vec<Tensor> = (0..self.seq_len)
            .map(|t| {
                rows_of(&plain(
                    &self.config,
                    builder(&vars),
                    &tokens.narrow(1, 0, t + 1)?,
                )?)?
                .unsqueeze(1)
            })
            .collect::<Result<_>>()?;
        let loss = autosp_reference::cross_entropy(&Tensor::cat(&rows, 1)?, &self.labels(tokens)?)?;
        let (_, gradients) = gradients(&vars, &loss)?;
        Ok(Found {
            out: loss.detach(),
            loss: scalar(&loss)?,
            gradients,
        })
    }

    /// Random variables under the names that the plain model asks for.
    fn start(&self, plain: Model) -> Tensors {
        let parameters = Parameters::init(1, DType::F32, &Device::Cpu);
        let one = tokens(1, 2, self.vocabulary, 1);
        plain(&self.config, parameters.builder(), &one).expect("the plain model");
        let shapes: BTreeMap<_, _> = parameters
            .named()
            .into_iter()
            .map(|(name, var)| (name, var.dims().to_vec()))
            .collect();
        variables(&shapes)
    }

    /// Next tokens; every fifth has no target.
    fn labels(&self, tokens: &Tensor) -> Result<Tensor> {
        let rows = tokens.to_dtype(DType::I64)?.to_vec2::<i64>()?;
        let s = self.seq_len;
        let label = |row: &[i64], i: usize| {
            if i % 5 == 4 && i + 1 < s {
                IGNORE
            } else {
                row[(i + 1) % s]
            }
        };
        let all: Vec<i64> = rows
            .iter()
            .flat_map(|row| (0..s).map(|i| label(row, i)))
            .collect();
        Tensor::from_vec(all, (self.rows, s), &Device::Cpu)
    }

    fn on_one(&self, start: &Tensors, plain: Model, tokens: &Tensor) -> Result<Found> {
        let vars = autosp_reference::variables(start)?;
        let out = plain(&self.config, builder(&vars), tokens)?;
        let loss = self.plain_loss(&out, tokens)?;
        let (_, gradients) = gradients(&vars, &loss)?;
        let loss = f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?);
        Ok(Found {
            out: out.detach(),
            loss,
            gradients,
        })
    }

    fn plain_loss(&self, out: &Tensor, tokens: &Tensor) -> Result<Tensor> {
        let labels = self.labels(tokens)?;
        match self.kind {
            Kind::Tokens => autosp_reference::cross_entropy(out, &labels),
            Kind::Last => autosp_reference::cross_entropy(
                &rows_of(out)?,
                &labels.narrow(1, self.seq_len - 1, 1)?.squeeze(1)?,
            ),
        }
    }

    fn on_ranks(
        &self,
        start: &Tensors,
        model: Model,
        tokens: &Tensor,
        sp: usize,
    ) -> autosp::Result<Found> {
        let labels = self.labels(tokens)?;
        let mut all = autosp::run_with(Settings::default().with_sp(sp).with_groups(2), |sp| {
            let vars = autosp_reference::variables(start)?;
            let batch = sp.shard_targets(tokens, &labels)?;
            let (out, loss, mut store) = sp.scope(|| -> autosp::Result<_> {
                let out = model(&self.config, builder(&vars), &batch.tokens)?;
                let loss = match self.kind {
                    Kind::Tokens => cross_entropy(&out, &batch.labels)?,
                    // Every rank has the row; one of them owns it.
                    Kind::Last => {
                        let label = labels.narrow(1, self.seq_len - 1, 1)?.squeeze(1)?;
                        let none = Tensor::full(IGNORE, self.rows, &Device::Cpu)?;
                        cross_entropy(
                            &rows_of(&out)?,
                            if sp.sp_rank() == 0 { &label } else { &none },
                        )?
                    }
                };
                Ok((
                    out.detach(),
                    f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?),
                    loss.backward()?,
                ))
            })?;
            let gradients = reduced(sp, &vars, &mut store)?;
            Ok(Found {
                out,
                loss,
                gradients,
            })
        })?;
        let out = match self.kind {
            Kind::Tokens => {
                let parts: Vec<&Tensor> = all.iter().map(|f| &f.out).collect();
                Tensor::cat(&parts, 1)?.narrow(1, 0, self.seq_len)?
            }
            Kind::Last => all[0].out.clone(),
        };
        let first = all.swap_remove(0);
        Ok(Found { out, ..first })
    }

    /// Contract 1 for the result, the loss and every gradient.
    fn compare(&self, what: &str, found: &Found, expected: &Found) {
        let largest =
            |t: &Tensor| global_norm(&Tensors::from([(String::new(), t.clone())])).expect("a norm");
        let apart = (&found.out - &expected.out).unwrap_or_else(|e| panic!("{what}: {e}"));
        let (difference, size) = (largest(&apart), largest(&expected.out));
        assert!(
            difference <= 1e-5 * size,
            "{what}: the result differs by {difference:e} of {size:e}"
        );
        assert!(
            (found.loss - expected.loss).abs() <= 1e-5 * expected.loss.abs(),
            "{what}: loss: expected {}, found {}",
            expected.loss,
            found.loss
        );
        let global = global_norm(&expected.gradients).expect("a norm");
        for (name, gradient) in &expected.gradients {
            let apart = (&found.gradients[name] - gradient)
                .unwrap_or_else(|e| panic!("{what}: {name}: {e}"));
            let (difference, size) = (largest(&apart), largest(gradient));
            let allowed = 1e-5 * size + 1e-7 * global;
            assert!(difference <= allowed, "{what}: the gradient of {name} differs by {difference:e} of {size:e}, allowed {allowed:e}");
        }
    }

    /// Outside a scope the annotated model is the file as it stands, on candle's fused operations.
    fn the_original_runs(
        &self,
        name: &str,
        start: &Tensors,
        annotated: Model,
        tokens: &Tensor,
        expected: &Found,
    ) {
        let vars = autosp_reference::variables(start).expect("copies");
        let out = annotated(&self.config, builder(&vars), tokens)
            .unwrap_or_else(|e| panic!("{name}, original: {e}"));
        let largest =
            |t: &Tensor| global_norm(&Tensors::from([(String::new(), t.clone())])).expect("a norm");
        let apart =
            largest(&(&out - &expected.out).unwrap_or_else(|e| panic!("{name}, original: {e}")));
        let size = largest(&expected.out);
        assert!(
            apart <= 1e-5 * size,
            "{name}: the original differs from the slow operations by {apart:e} of {size:e}"
        );
    }

    /// Every variable gets a gradient on one device, but for those that the model's own code detaches.
    fn all_get_gradients(&self, name: &str, expected: &Found) {
        for (variable, gradient) in &expected.gradients {
            let size =
                global_norm(&Tensors::from([(String::new(), gradient.clone())])).expect("a norm");
            if self.sparse.iter().any(|part| variable.contains(part)) {
                continue;
            }
            let detached = self.detached.iter().any(|part| variable.contains(part));
            assert_eq!(
                size == 0.0,
                detached,
                "{name}: {variable} has a gradient of norm {size}"
            );
        }
    }

    /// A feature that is switched off changes the result.
    fn no_part_is_idle(&self, name: &str, plain: Model, tokens: &Tensor, expected: &Found) {
        for change in &self.off {
            let mut other = self.clone();
            for (key, value) in change.as_object().into_iter().flatten() {
                other.config[key] = value.clone();
            }
            let start = other.start(plain);
            let found = other
                .on_one(&start, plain, tokens)
                .unwrap_or_else(|e| panic!("{name} with {change}: {e}"));
            let apart =
                (&found.out - &expected.out).and_then(|d| d.abs()?.max_all()?.to_scalar::<f32>());
            assert!(
                apart.is_ok_and(|d| d > 1e-3),
                "{name}: {change} changes nothing"
            );
        }
    }

    /// The gradient is the slope of the plain model's loss, along random directions over all variables.
    fn slopes(&self, name: &str, start: &Tensors, plain: Model, tokens: &Tensor, found: &Found) {
        let loss = |step: f64, direction: &Tensors| -> Result<f64> {
            let moved = start
                .iter()
                .filter(|(name, _)| !self.detached.iter().any(|part| name.contains(part)))
                .map(|(name, t)| Ok((name.clone(), (t + (&direction[name] * step)?)?)));
            let mut moved: Tensors = moved.collect::<Result<_>>()?;
            for (name, t) in start {
                moved.entry(name.clone()).or_insert_with(|| t.clone());
            }
            let vars = autosp_reference::variables(&moved)?;
            let out = plain(&self.config, builder(&vars), tokens)?;
            Ok(f64::from(
                self.plain_loss(&out, tokens)?
                    .to_dtype(DType::F32)?
                    .to_scalar::<f32>()?,
            ))
        };
        let shapes: BTreeMap<String, Vec<usize>> = start
            .iter()
            .map(|(n, t)| (format!("direction of {n}"), t.dims().to_vec()))
            .collect();
        let random = variables(&shapes);
        let direction: Tensors = start
            .iter()
            .map(|(name, t)| {
                // Towards the gradient and aside, so that the slope is not lost in rounding.
                let (g, r) = (
                    &found.gradients[name],
                    &random[&format!("direction of {name}")],
                );
                let size = |t: &Tensor| {
                    global_norm(&Tensors::from([(String::new(), t.clone())])).expect("a norm")
                };
                let aside = 0.3 * size(g) / size(r).max(1e-12);
                (
                    name.clone(),
                    (g + (r * aside).expect("scaled"))
                        .expect("same shape")
                        .reshape(t.shape())
                        .expect("same shape"),
                )
            })
            .collect();
        let length = global_norm(&direction).expect("a norm");
        let unit: Tensors = direction
            .iter()
            .map(|(n, t)| (n.clone(), (t / length).expect("scaled")))
            .collect();
        let slope: f64 = unit
            .iter()
            .filter(|(name, _)| !self.detached.iter().any(|part| name.contains(part)))
            .map(|(name, t)| {
                let product = (t * &found.gradients[name])
                    .and_then(|t| t.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>());
                product.expect("same shape")
            })
            .sum();
        let step = 2e-3;
        let (above, below) = (
            loss(step, &unit).expect("a loss"),
            loss(-step, &unit).expect("a loss"),
        );
        let measured = (above - below) / (2.0 * step);
        assert!(
            (measured - slope).abs() <= 0.03 * slope.abs() + 1e-3,
            "{name}: slope {slope}, measured {measured}"
        );
    }
}

fn builder(vars: &Variables) -> VarBuilder<'static> {
    autosp_reference::builder(vars, DType::F32, &Device::Cpu)
}

/// `[b, 1, width]` or `[b, width]` as `[b, width]`.
fn rows_of(out: &Tensor) -> Result<Tensor> {
    if out.rank() == 3 {
        out.squeeze(1)
    } else {
        Ok(out.clone())
    }
}

/// The gradients of all variables, summed over the ranks.
fn reduced(
    sp: &autosp::Sp,
    vars: &Variables,
    store: &mut candle::backprop::GradStore,
) -> autosp::Result<Tensors> {
    let list: Vec<_> = vars.values().cloned().collect();
    for var in &list {
        if store.get(var).is_none() {
            store.insert(var, var.zeros_like()?);
        }
    }
    sp.reduce_gradients(store, &list)?;
    let gradient = |var: &candle::Var| {
        store
            .get(var)
            .map_or_else(|| var.zeros_like(), |g| Ok(g.detach()))
    };
    Ok(vars
        .iter()
        .map(|(name, var)| Ok((name.clone(), gradient(var)?)))
        .collect::<Result<_>>()?)
}

fn scalar(loss: &Tensor) -> Result<f64> {
    Ok(f64::from(loss.to_dtype(DType::F32)?.to_scalar::<f32>()?))
}
