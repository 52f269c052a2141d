//! The capabilities that every node has: `echo`, `system.health`, `system.identity`.
//!
//! What never lives here: anything that changes the machine.

use std::path::Path;

use serde_json::{Value, json};

use crate::capability::Builtin;
use crate::exec::is_json;
use crate::service::AgentStatus;
use crate::work::Outcome;

/// Runs one. `home` is the folder whose disk is measured, `status` what the agent knows of itself.
pub(crate) fn run(builtin: Builtin, input: &[u8], home: &Path, status: &AgentStatus) -> Outcome {
    let answer = match builtin {
        Builtin::Echo if is_json(input) => return Outcome::Succeeded(input.to_vec()),
        Builtin::Echo => return Outcome::failed("input_not_json", "the payload is not one JSON value"),
        Builtin::SystemHealth => health(home),
        Builtin::SystemIdentity => identity(status),
    };
    Outcome::Succeeded(answer.to_string().into_bytes())
}

fn health(home: &Path) -> Value {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    json!({
        "load": parse_load(&text("/proc/loadavg")),
        "cpus": std::thread::available_parallelism().map_or(0, |count| count.get()),
        "memory": parse_memory(&text("/proc/meminfo")),
        "disk": disk(home),
        "uptime_seconds": parse_uptime(&text("/proc/uptime")),
    })
}

/// Runnable tasks, averaged over 1, 5 and 15 minutes; `null` where `/proc` doesn't say.
fn parse_load(text: &str) -> Value {
    let numbers: Vec<f64> = text
        .split_whitespace()
        .take(3)
        .filter_map(|word| word.parse().ok())
        .collect();
    if numbers.len() == 3 {
        json!(numbers)
    } else {
        Value::Null
    }
}

fn parse_memory(text: &str) -> Value {
    let field = |name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        line.split_whitespace()
            .nth(1)?
            .parse::<u64>()
            .ok()
            .map(|kib| kib * 1024)
    };
    json!({ "total_bytes": field("MemTotal:"), "available_bytes": field("MemAvailable:") })
}

fn parse_uptime(text: &str) -> Value {
    text.split_whitespace()
        .next()
        .and_then(|word| word.parse::<f64>().ok())
        .map_or(Value::Null, |s| json!(s))
}

fn disk(home: &Path) -> Value {
    match nix::sys::statvfs::statvfs(home) {
        Ok(stat) => json!({
            "path": home.display().to_string(),
            "total_bytes": stat.blocks() * stat.fragment_size(),
            "available_bytes": stat.blocks_available() * stat.fragment_size(),
        }),
        Err(_) => Value::Null,
    }
}

fn identity(status: &AgentStatus) -> Value {
    json!({
        "device_id": status.device_id,
        "name": status.name,
        "certificate_fingerprint": status.fingerprint,
        "certificate_not_after_ms": status.not_after_ms,
        "replica_id": status.replica_id,
        "endpoint": status.endpoint,
        "session_epoch": status.epoch,
        "transport": status.transport,
        "transport_fallback": status.fallback,
        "agent_version": env!("CARGO_PKG_VERSION"),
        "platform": platform(),
    })
}

/// `linux/x86_64`.
pub(crate) fn platform() -> String {
    format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn health_is_json_with_numbers_of_this_machine() {
        let Outcome::Succeeded(bytes) = run(
            Builtin::SystemHealth,
            b"",
            Path::new("/"),
            &AgentStatus::default(),
        ) else {
            panic!("health failed")
        };
        let value: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(value["load"].as_array().unwrap().len(), 3);
        assert!(value["memory"]["total_bytes"].as_u64().unwrap() > 1 << 20);
        assert!(value["disk"]["total_bytes"].as_u64() >= value["disk"]["available_bytes"].as_u64());
        assert!(value["uptime_seconds"].as_f64().unwrap() > 0.0);
    }

    #[test]
    fn odd_proc_files_give_null_not_a_guess() {
        assert_eq!(parse_load("0.1 x"), Value::Null);
        assert_eq!(parse_uptime(""), Value::Null);
        assert_eq!(parse_memory("MemTotal: many kB")["total_bytes"], Value::Null);
    }

    #[test]
    fn echo_answers_what_it_got() {
        let got = run(Builtin::Echo, b"[1,2]", Path::new("/"), &AgentStatus::default());
        assert_eq!(got, Outcome::Succeeded(b"[1,2]".to_vec()));
    }
}
