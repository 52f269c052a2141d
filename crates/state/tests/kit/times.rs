//! Times in scripts: `90s` in, `T+90s` out.

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

pub(crate) fn duration(text: &str) -> u64 {
    let (number, unit) = text.split_at(text.len() - 1);
    let unit = match unit {
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        other => panic!("no unit: {other}"),
    };
    number.parse::<u64>().unwrap() * unit
}
