//! Times in what comes out of scripts: `T+90s`.

use std::fmt::Write as _;

use crate::kit;

pub(crate) fn relative_times(line: &str) -> String {
    let mut out = String::new();
    let mut digits = String::new();
    for symbol in line.chars().chain(['\n']) {
        if symbol.is_ascii_digit() {
            digits.push(symbol);
            continue;
        }
        match digits.parse::<u64>() {
            Ok(at) if digits.len() == 13 && at >= kit::T0 => {
                write!(out, "T+{}s", (at - kit::T0) / 1_000).unwrap()
            }
            _ => out.push_str(&digits),
        }
        digits.clear();
        out.push(symbol);
    }
    out.trim_end().to_owned()
}
