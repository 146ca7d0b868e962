//! Takes fields out of a JSON object, one by one, and says what is wrong with them.

use serde_json::{Map, Value};

/// The fields that have not been taken yet.
pub(super) struct Fields {
    map: Map<String, Value>,
    /// The object's name and a dot, for messages.
    prefix: String,
}

impl Fields {
    pub(super) fn new(map: Map<String, Value>) -> Self {
        Self {
            map,
            prefix: String::new(),
        }
    }

    pub(super) fn within(name: &str, map: Map<String, Value>) -> Self {
        Self {
            map,
            prefix: format!("{name}."),
        }
    }

    /// What has not been taken.
    pub(super) fn rest(self) -> Map<String, Value> {
        self.map
    }

    pub(super) fn peek(&self, name: &str) -> Option<&Value> {
        self.map.get(name)
    }

    /// A whole number of at least 1, under the first of its names that is there.
    pub(super) fn count(&mut self, names: &[&str]) -> Result<usize, String> {
        self.optional_count(names)?
            .ok_or_else(|| self.missing(names))
    }

    pub(super) fn optional_count(&mut self, names: &[&str]) -> Result<Option<usize>, String> {
        self.take(names, "a whole number of at least 1", |value| {
            let n = usize::try_from(value.as_u64()?).ok()?;
            (n > 0).then_some(n)
        })
    }

    /// A number above 0.
    pub(super) fn positive(&mut self, names: &[&str]) -> Result<f64, String> {
        self.optional_positive(names)?
            .ok_or_else(|| self.missing(names))
    }

    pub(super) fn optional_positive(&mut self, names: &[&str]) -> Result<Option<f64>, String> {
        self.take(names, "a number above 0", |value| {
            value.as_f64().filter(|x| *x > 0.0)
        })
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>, String> {
        self.take(&[name], "true or false", Value::as_bool)
    }

    pub(super) fn word(&mut self, names: &[&str]) -> Result<Option<String>, String> {
        self.take(names, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// A list of strings; empty if it is not there.
    pub(super) fn words(&mut self, name: &str) -> Result<Vec<String>, String> {
        let list = self.take(&[name], "a list of strings", |value| {
            let words = value.as_array()?.iter();
            words.map(|word| word.as_str().map(str::to_owned)).collect()
        })?;
        Ok(list.unwrap_or_default())
    }

    /// A token; old files write -1 for none.
    pub(super) fn token(&mut self, name: &str) -> Result<Option<u32>, String> {
        let token = self.take(&[name], "a token", |value| match value.as_i64() {
            Some(-1) => Some(None),
            _ => id(value).map(Some),
        })?;
        Ok(token.flatten())
    }

    /// A token or a list of them.
    pub(super) fn tokens(&mut self, name: &str) -> Result<Vec<u32>, String> {
        let list = self.take(&[name], "a token or a list of them", |value| {
            match value.as_array() {
                Some(list) => list.iter().map(id).collect(),
                None => id(value).map(|token| vec![token]),
            }
        })?;
        Ok(list.unwrap_or_default())
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, String> {
        self.take(&[name], "an object", |value| value.as_object().cloned())
    }

    /// The first of the names that is there and not null, read by `read`.
    fn take<T>(
        &mut self,
        names: &[&str],
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, String> {
        for name in names {
            match self.map.remove(*name) {
                None | Some(Value::Null) => {}
                Some(value) => {
                    return read(&value).map(Some).ok_or_else(|| {
                        format!(
                            "expected {expected} for `{}{name}`, found {value}",
                            self.prefix
                        )
                    });
                }
            }
        }
        Ok(None)
    }

    fn missing(&self, names: &[&str]) -> String {
        format!("expected `{}{}`, found none", self.prefix, names[0])
    }
}

fn id(value: &Value) -> Option<u32> {
    u32::try_from(value.as_u64()?).ok()
}
