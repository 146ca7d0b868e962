//! Sizes and lengths as people write them: `141GiB`, `2TiB`, `1M`.

/// Factors of lengths: 1K is 1024.
const LENGTHS: &[(&str, u64)] = &[("K", 1 << 10), ("M", 1 << 20), ("G", 1 << 30)];

/// Factors of sizes.
const SIZES: &[(&str, u64)] = &[
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

/// A number of tokens: `131072`, `128K` or `1M`, where 1K = 1024 and 1M = 1024 K. `None` for anything else, for 0 and for what is no
/// whole number.
///
/// ```
/// use autosp_plan::units::length;
///
/// assert_eq!((length("1M"), length("131072"), length("1.5K")), (Some(1 << 20), Some(131_072), Some(1536)));
/// assert_eq!((length("0"), length("1 km")), (None, None));
/// ```
pub fn length(text: &str) -> Option<usize> {
    usize::try_from(scaled(text, LENGTHS)?).ok()
}

/// A number of bytes: `141GiB`, `2TiB`, `80GB` or `1073741824`. `None` for anything else and for 0.
///
/// ```
/// use autosp_plan::units::size;
///
/// assert_eq!((size("141GiB"), size("80 GB")), (Some(141 << 30), Some(80_000_000_000)));
/// assert_eq!((size("1G"), size("-1GiB")), (None, None));
/// ```
pub fn size(text: &str) -> Option<u64> {
    scaled(text, SIZES)
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let text = text.trim();
    let unit = units.iter().find_map(|&(unit, factor)| {
        let cut = text.len().checked_sub(unit.len())?;
        let (number, end) = (text.get(..cut)?, text.get(cut..)?);
        end.eq_ignore_ascii_case(unit).then_some((number, factor))
    });
    let (number, factor) = unit.unwrap_or((text, 1));
    let number = number.trim();
    let known = |c: char| c.is_ascii_digit() || c == '.';
    if !number.starts_with(|c: char| c.is_ascii_digit()) || !number.chars().all(known) {
        return None;
    }
    let value = if let Ok(whole) = number.parse::<u64>() {
        whole.checked_mul(factor)?
    } else {
        let scaled = number.parse::<f64>().ok()? * factor as f64;
        // Beyond 2^53 a float no longer tells whole numbers apart.
        let exact = scaled.fract() == 0.0 && scaled < 9_007_199_254_740_992.0;
        exact.then_some(scaled as u64)?
    };
    (value > 0).then_some(value)
}

/// A length as it is written: `1M`, `128K`, `1000`.
pub fn show_length(tokens: usize) -> String {
    for (unit, factor) in LENGTHS.iter().rev() {
        let factor = *factor as usize;
        if tokens >= factor && tokens.is_multiple_of(factor) {
            return format!("{}{unit}", tokens / factor);
        }
    }
    tokens.to_string()
}

/// Bytes in GiB with two digits, or in the unit that fits where there are fewer.
pub fn show_size(bytes: u64) -> String {
    let (unit, factor) = match bytes {
        0..0x10_0000 => ("KiB", 1 << 10),
        0x10_0000..0x400_0000 => ("MiB", 1 << 20),
        _ => ("GiB", 1 << 30),
    };
    format!("{:.2} {unit}", bytes as f64 / f64::from(factor))
}

/// Seconds with three digits: `2.56 s`, `135 ms`.
pub fn show_seconds(seconds: f64) -> String {
    match seconds {
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 10.0 => format!("{s:.1} s"),
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 0.1 => format!("{:.0} ms", s * 1e3),
        s => format!("{:.1} ms", s * 1e3),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_size_is_none() {
        for text in [
            "",
            "GiB",
            "-1",
            "1e3",
            "1.2.3",
            "1 G",
            "é",
            "éB",
            "0.3",
            "nan",
            "99999999999TiB",
        ] {
            assert_eq!(size(text), None, "{text}");
        }
        for text in ["", "K", "-1", "1e3", "1Ki", "0.3K", "k"] {
            assert_eq!(length(text), None, "{text}");
        }
        assert_eq!(
            (size("0.5gib"), size("2 TiB")),
            (Some(1 << 29), Some(2 << 40))
        );
        assert_eq!(
            (length("1m"), length("8k"), length("0.5M")),
            (Some(1 << 20), Some(8192), Some(1 << 19))
        );
    }

    #[test]
    fn seconds_keep_three_digits() {
        let shown = [250.4, 25.04, 2.504, 0.2504, 0.02504].map(show_seconds);
        assert_eq!(shown, ["250 s", "25.0 s", "2.50 s", "250 ms", "25.0 ms"]);
    }

    proptest! {
        #[test]
        fn lengths_are_read_back(tokens in 1usize..1 << 40) {
            prop_assert_eq!(length(&show_length(tokens)), Some(tokens));
        }
    }
}
