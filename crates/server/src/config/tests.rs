//! What a configuration accepts, and what its refusals say.

use std::path::Path;
use std::time::Duration;

use palyra_pki::layout::{NewConfig, render_config};

use super::{Config, LogFormat, split};

fn fresh() -> String {
    render_config(&NewConfig {
        cluster_id: "01JD7Z8QK3M5N7P9R1S3T5V7X9",
        trust_domain: "palyra.01jd7z8q.internal",
        replica_id: 2,
        name: "r2",
        listen_host: "127.0.0.1",
        base_port: 7450,
        advertise_host: "r2.example",
    })
}

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("/d/palyrad.toml")).map_err(|error| error.to_string())
}

#[test]
fn what_init_writes_is_understood() {
    let config = parse(&fresh()).unwrap();
    assert_eq!((config.replica.id, config.replica.name.as_str()), (2, "r2"));
    assert_eq!(config.replica.data_dir, Path::new("/d"));
    let listens = config.listen_addresses();
    assert_eq!(
        (listens.node.as_str(), listens.enrol.as_str()),
        ("127.0.0.1:7451", "127.0.0.1:7452")
    );
    assert_eq!(
        (listens.peers.as_str(), listens.metrics.as_str()),
        ("127.0.0.1:7454", "127.0.0.1:7455")
    );
    assert_eq!(config.advertised_addresses().node, "r2.example:7451");
    assert_eq!(
        (listens.quic.as_str(), config.advertised_addresses().quic.as_str()),
        ("127.0.0.1:7453", "r2.example:7453")
    );
    let without = parse(&fresh().replace("[listen]", "[listen]\nquic = \"off\"")).unwrap();
    assert_eq!(without.listen_addresses().quic, "");
    assert_eq!(without.advertised_addresses().quic, "");
    assert_eq!(config.advertised_addresses().metrics, "127.0.0.1:7455");
    let names = config.host_names();
    assert_eq!(names.dns, ["localhost", "r2.example"]);
    assert_eq!(names.ips, ["127.0.0.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(config.timers.max_staleness.get(), Duration::from_secs(5));
    assert_eq!(config.log.format, LogFormat::Text);
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest() {
    let text = format!("{}\n[limits]\nconections = 100\n", fresh());
    let line = text.lines().count();
    assert_eq!(
        parse(&text).unwrap_err(),
        format!("/d/palyrad.toml:{line}: limits.conections: unknown key; did you mean `connections`?")
    );
    let error = parse(&format!("{}\n[limitz]\n", fresh())).unwrap_err();
    assert!(
        error.contains("limitz: unknown key; did you mean `limits`?"),
        "{error}"
    );
    let error = parse(&fresh().replace("[log]", "[log]\nzzzzzz = 1")).unwrap_err();
    assert!(
        error.contains("log.zzzzzz: unknown key; known here are level, format"),
        "{error}"
    );
}

#[test]
fn a_value_out_of_bounds_is_named_with_its_line() {
    let error = parse(&format!("{}\n[timers]\nhandshake = \"2h\"\n", fresh())).unwrap_err();
    assert!(
        error.contains("timers.handshake: \"2h\" is out of bounds; from 100ms to 1m"),
        "{error}"
    );
    let error = parse(&format!("{}\n[limits]\nmessage = \"1KiB\"\n", fresh())).unwrap_err();
    assert!(error.contains("limits.message"), "{error}");
    let error = parse(&fresh().replace("base_port = 7450", "base_port = 99999")).unwrap_err();
    assert!(error.contains("listen.base_port"), "{error}");
}

#[test]
fn what_makes_no_sense_together_is_refused() {
    for (addition, key) in [
        ("[raft]\nelection_min = \"200ms\"", "raft.election_min"),
        (
            "[raft]\nelection_min = \"2s\"\nelection_max = \"2s\"",
            "raft.election_max",
        ),
        (
            "[timers]\nheartbeat = \"10s\"\nheartbeat_timeout = \"11s\"",
            "timers.heartbeat_timeout",
        ),
        ("[timers]\ndrain = \"9s\"", "timers.drain"),
    ] {
        let error = parse(&format!("{}\n{addition}\n", fresh())).unwrap_err();
        let line = fresh().lines().count() + 1 + addition.lines().count();
        assert!(
            error.starts_with(&format!("/d/palyrad.toml:{line}: {key}: ")),
            "{error}"
        );
    }
    for (from, to, key) in [
        ("id = 2", "id = 0", "replica.id"),
        ("\"r2\"", "\"R 2\"", "replica.name"),
        ("01JD7Z8QK3M5N7P9R1S3T5V7X9", "nothing", "replica.cluster_id"),
        ("level = \"info\"", "level = \"loud!\"", "log.level"),
        ("base_port = 7450", "base_port = 65531", "listen.base_port"),
        (
            "[advertise]",
            "node = \"127.0.0.1:7452\"\n[advertise]",
            "listen.base_port",
        ),
        ("[advertise]", "node = \"nowhere\"\n[advertise]", "listen.node"),
        ("r2.example", "0.0.0.0", "advertise.host"),
    ] {
        let error = parse(&fresh().replacen(from, to, 1)).unwrap_err();
        assert!(error.contains(&format!(" {key}: ")), "{key}: {error}");
    }
}

#[test]
fn an_absent_file_says_how_to_make_one() {
    let error = Config::load(Path::new("/nowhere/palyrad.toml"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("/nowhere/palyrad.toml") && error.contains("palyra cluster init"),
        "{error}"
    );
}

#[test]
fn addresses_are_split_strictly() {
    assert_eq!(split("127.0.0.1:7441"), Some(("127.0.0.1", 7441)));
    assert_eq!(split("[::1]:7441"), Some(("[::1]", 7441)));
    for bad in ["", ":7441", "host", "host:", "host:0", "host:70000", "::1:7441"] {
        assert_eq!(split(bad), None, "{bad}");
    }
}
