//! What training needs, for people.

use askama::Template;

/// An estimate; numbers are texts with their units.
#[derive(Debug, Default, Template)]
#[template(path = "report/estimate.txt")]
pub struct Estimate {
    /// The model's file, and its sizes.
    pub model: String,
    /// GPUs and memory.
    pub machine: String,
    /// What the sequence is, and whether it fits.
    pub verdict: String,
    /// Name, value, and who chose it.
    pub choices: Vec<[String; 3]>,
    /// Name and bytes of each part at the peak.
    pub memory: Vec<[String; 2]>,
    /// Where the peak is.
    pub region: String,
    /// Peak, what may be used, and the host.
    pub totals: Vec<[String; 2]>,
    /// Name, seconds and share of each part.
    pub time: Vec<[String; 3]>,
    /// Step, rate and convention.
    pub rate: Vec<String>,
    /// What limits, and the longest sequence.
    pub limits: Vec<[String; 2]>,
    /// A change, and the longest sequence then.
    pub advice: Vec<[String; 2]>,
    /// What the choice needs that is not there yet.
    pub needs: Vec<String>,
}
