//! Text as bytes, and the batches that are cut from it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use autosp::{Result, codes};
use candle_core::{Device, Tensor};

use crate::{Options, failure, file_failure};

/// Folders that hold no text of the workspace.
const SKIPPED: &[&str] = &["target", "out", "data", "golden"];

/// What is read in a folder; a file that is named itself is read whatever its name.
const EXTENSIONS: &[&str] = &["rs", "md", "txt", "toml", "py", "c", "h", "cpp", "js", "ts", "html", "css", "tex", "rst", "org"];

/// A text of one byte a token.
#[derive(Debug, Clone)]
pub struct Text {
    bytes: Vec<u8>,
}

impl Text {
    /// Reads all files, in the order of their names.
    ///
    /// # Errors
    /// A path that cannot be read, no text at all, or less of it than one sequence.
    pub fn read(options: &Options) -> Result<Self> {
        let workspace = [PathBuf::from(env!("CARGO_MANIFEST_DIR"))];
        let paths = if options.data.is_empty() { &workspace[..] } else { &options.data };
        let mut bytes = Vec::new();
        for path in paths {
            collect(path, true, &mut bytes)
                .map_err(|error| file_failure(codes::FILE_UNREADABLE, "read", path, &error))?;
        }
        let named = || paths.iter().map(|path| format!("`{}`", path.display())).collect::<Vec<_>>().join(", ");
        if bytes.is_empty() {
            return Err(failure(format!("expected text, found none in {}", named())));
        }
        if bytes.len() <= options.seq_len {
            let (most, found) = (bytes.len() - 1, options.seq_len);
            return Err(failure(format!("expected --seq-len of at most {most} (the text in {}), found {found}", named())));
        }
        Ok(Self { bytes })
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The first `n` bytes of a line near the middle of the text.
    pub fn prompt(&self, n: usize) -> &[u8] {
        let middle = self.bytes.len() / 2;
        let line = self.bytes[middle..].iter().position(|&byte| byte == b'\n').map_or(middle, |at| middle + at + 1);
        let start = line.min(self.bytes.len().saturating_sub(n));
        &self.bytes[start..(start + n).min(self.bytes.len())]
    }

    /// The global batch of a step: tokens and labels, `[b, s]` each; the label of a byte is the byte after it. It depends on the
    /// seed and the step alone.
    ///
    /// # Errors
    /// When a tensor cannot be made.
    pub fn batch(&self, step: usize, options: &Options) -> Result<(Tensor, Tensor)> {
        let (b, s) = (options.batch, options.seq_len);
        let (mut tokens, mut labels) = (Vec::with_capacity(b * s), Vec::with_capacity(b * s));
        for row in 0..b {
            let draw = mix(mix(mix(options.seed) ^ step as u64) ^ row as u64);
            let start = (draw % (self.bytes.len() - s) as u64) as usize;
            tokens.extend(self.bytes[start..start + s].iter().map(|&byte| u32::from(byte)));
            labels.extend(self.bytes[start + 1..=start + s].iter().map(|&byte| i64::from(byte)));
        }
        Ok((Tensor::from_vec(tokens, (b, s), &Device::Cpu)?, Tensor::from_vec(labels, (b, s), &Device::Cpu)?))
    }
}

/// The output function of `SplitMix64` (Steele, Lea and Flood, 2014): from a counter to 64 well-mixed bits.
pub fn mix(counter: u64) -> u64 {
    let z = counter.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Appends the file, or every text file below the folder.
fn collect(path: &Path, named: bool, bytes: &mut Vec<u8>) -> io::Result<()> {
    if path.is_dir() {
        let mut entries = fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
        entries.sort();
        for entry in entries {
            let name = entry.file_name().unwrap_or_default().to_string_lossy();
            if !name.starts_with('.') && !SKIPPED.contains(&name.as_ref()) {
                collect(&entry, false, bytes)?;
            }
        }
    } else {
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase();
        if named || EXTENSIONS.contains(&extension.as_str()) {
            bytes.extend(fs::read(path)?);
        }
    }
    Ok(())
}
