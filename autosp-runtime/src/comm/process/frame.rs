//! What travels between the processes of a run, as bytes: a header in JSON, and a tensor's elements as they lie in memory.
//!
//! `u32` length of the header, `u64` length of the elements, header, elements; little-endian. All ranks run the same program, so that
//! elements have one form.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::str::FromStr;
use std::sync::Mutex;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::View;
use serde_json::{Value, json};

use crate::comm::Tag;
use crate::comm::local::{Envelope, Letter, lock};
use crate::{Error, comm::local::Fault};

/// The longest header: a fault with the last collectives of all ranks is a few kilobytes.
const MOST_HEADER: u32 = 1 << 20;

/// One message of one rank to another.
#[derive(Debug)]
pub(crate) enum Frame {
    /// Its part of a collective: kind of the group, place in the group's order.
    Letter(&'static str, u64, Envelope),
    /// That it is alive, and its last collectives.
    Beat(String),
    /// That a rank failed, and how.
    Fault(Fault),
    /// That it has returned from the closure of the run.
    Returned,
}

impl Frame {
    /// Writes the frame and flushes.
    ///
    /// # Errors
    /// When the other side is gone or takes nothing for too long.
    pub(super) fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let mut elements = std::borrow::Cow::Borrowed(&[][..]);
        let header = match self {
            Self::Letter(kind, sequence, Envelope { tag, letter }) => {
                let (what, dims, dtype) = match letter {
                    Letter::Empty => ("empty", &[][..], None),
                    Letter::Part(part) => {
                        elements = View::data(part);
                        ("part", part.dims(), Some(part.dtype()))
                    }
                    #[cfg(feature = "cuda")]
                    Letter::Announced(dims, dtype) => ("announced", &dims[..], Some(*dtype)),
                };
                let Tag {
                    name,
                    direction,
                    group,
                    step,
                    exchange,
                } = tag;
                json!({
                    "frame": "letter", "kind": kind, "sequence": sequence, "name": name, "direction": direction, "group": group,
                    "step": step, "exchange": exchange, "what": what, "dims": dims, "dtype": dtype.map(|dtype: DType| dtype.as_str()),
                })
            }
            Self::Beat(history) => json!({ "frame": "beat", "history": history }),
            Self::Fault(Fault { rank, error }) => {
                json!({ "frame": "fault", "rank": rank, "error": error.to_json() })
            }
            Self::Returned => json!({ "frame": "returned" }),
        };
        let header = header.to_string();
        to.write_all(&(header.len() as u32).to_le_bytes())?;
        to.write_all(&(elements.len() as u64).to_le_bytes())?;
        to.write_all(header.as_bytes())?;
        to.write_all(&elements)?;
        to.flush()
    }

    /// Reads one frame.
    ///
    /// # Errors
    /// When the other side is gone, says nothing for too long, or says something else.
    pub(super) fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut lengths = [0; 12];
        from.read_exact(&mut lengths)?;
        let [a, b, c, d, rest @ ..] = lengths;
        let (header, elements) = (
            u32::from_le_bytes([a, b, c, d]),
            u64::from_le_bytes(rest) as usize,
        );
        if header > MOST_HEADER {
            return Err(broken("a header of no sensible length"));
        }
        let mut text = vec![0; header as usize];
        from.read_exact(&mut text)?;
        let header: Value = serde_json::from_slice(&text)?;
        let mut data = Vec::new();
        from.take(elements as u64).read_to_end(&mut data)?;
        if data.len() < elements {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Self::of(&header, &data).ok_or_else(|| broken(format_args!("an unknown frame: {header}")))
    }

    fn of(header: &Value, data: &[u8]) -> Option<Self> {
        let word = |name: &str| header[name].as_str();
        let number = |name: &str| header[name].as_u64();
        Some(match word("frame")? {
            "letter" => {
                let tag = Tag {
                    name: intern(word("name")?),
                    direction: intern(word("direction")?),
                    group: number("group")? as usize,
                    step: number("step")?,
                    exchange: header["exchange"].as_bool()?,
                };
                let dims = header["dims"].as_array()?.iter();
                let dims: Vec<usize> = dims
                    .map(|n| n.as_u64().map(|n| n as usize))
                    .collect::<Option<_>>()?;
                let dtype = || DType::from_str(word("dtype")?).ok();
                let letter = match word("what")? {
                    "empty" => Letter::Empty,
                    "part" => {
                        let part = Tensor::from_raw_buffer(data, dtype()?, &dims, &Device::Cpu);
                        Letter::Part(part.ok()?)
                    }
                    #[cfg(feature = "cuda")]
                    "announced" => Letter::Announced(dims, dtype()?),
                    _ => return None,
                };
                let envelope = Envelope { tag, letter };
                Self::Letter(intern(word("kind")?), number("sequence")?, envelope)
            }
            "beat" => Self::Beat(word("history")?.to_owned()),
            "fault" => Self::Fault(Fault {
                rank: number("rank")? as usize,
                error: Error::from_json(&header["error"])?,
            }),
            "returned" => Self::Returned,
            _ => return None,
        })
    }
}

fn broken(what: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("found {what}"))
}

/// A name of a collective of another rank, which runs the same program: there are as many as in the program.
fn intern(name: &str) -> &'static str {
    static NAMES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut names = lock(&NAMES);
    if let Some(known) = names.get(name) {
        return known;
    }
    let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
    names.insert(name);
    name
}

#[cfg(test)]
mod tests {
    use autosp_plan::codes;
    use proptest::prelude::*;

    use super::*;

    fn again(frame: &Frame) -> Frame {
        let mut bytes = Vec::new();
        frame.write(&mut bytes).unwrap();
        let mut rest = bytes.as_slice();
        let read = Frame::read(&mut rest).unwrap();
        assert!(rest.is_empty());
        read
    }

    proptest! {
        #[test]
        fn letters_arrive_as_they_were_sent(
            dims in prop::collection::vec(0usize..4, 0..4), seed in any::<u32>(), step in any::<u64>(), group in 0usize..9, exchange in any::<bool>(),
            dtype in prop_oneof![Just(DType::F32), Just(DType::F64), Just(DType::BF16), Just(DType::F16), Just(DType::U8), Just(DType::U32), Just(DType::I64)],
        ) {
            let n: usize = dims.iter().product();
            let values: Vec<f32> = (0..n).map(|i| ((i as u32).wrapping_mul(31).wrapping_add(seed) % 97) as f32).collect();
            let part = Tensor::from_vec(values, dims.as_slice(), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let tag = Tag { name: "a site", direction: "qkv", group, step, exchange };
            let sent = Envelope { tag, letter: Letter::Part(part.clone()) };
            let Frame::Letter("sp", 7, Envelope { tag: found, letter: Letter::Part(got) }) = again(&Frame::Letter("sp", 7, sent)) else {
                panic!("another frame");
            };
            prop_assert_eq!((found, got.dims(), got.dtype()), (tag, part.dims(), dtype));
            let numbers = |x: &Tensor| x.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            prop_assert_eq!(numbers(&got), numbers(&part));
        }

        /// Damage is an error, or another frame, but no panic and no endless wait.
        #[test]
        fn damage_is_found(at in 0usize..200, bits in 1u8..=255, cut in 0usize..200) {
            let mut bytes = Vec::new();
            let part = Tensor::new(&[1f32, 2.0, 3.0], &Device::Cpu).unwrap();
            let envelope = Envelope { tag: Tag::new("a site", "qkv"), letter: Letter::Part(part) };
            Frame::Letter("sp", 3, envelope).write(&mut bytes).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= bits;
            bytes.truncate(bytes.len() - cut % bytes.len());
            let _ = Frame::read(&mut bytes.as_slice());
        }
    }

    #[test]
    fn a_fault_keeps_its_code_and_help() {
        let error = Error::new(codes::MISMATCH, "expected x, found y").with_help("do z");
        let text = error.to_string();
        let Frame::Fault(Fault { rank: 3, error }) = again(&Frame::Fault(Fault { rank: 3, error }))
        else {
            panic!("another frame");
        };
        assert_eq!(error.to_string(), text);
        assert!(matches!(again(&Frame::Beat("x".into())), Frame::Beat(x) if x == "x"));
        assert!(matches!(again(&Frame::Returned), Frame::Returned));
    }

    #[test]
    fn what_is_cut_short_is_an_error() {
        let mut bytes = Vec::new();
        Frame::Returned.write(&mut bytes).unwrap();
        for end in 0..bytes.len() {
            assert!(Frame::read(&mut &bytes[..end]).is_err());
        }
    }
}
