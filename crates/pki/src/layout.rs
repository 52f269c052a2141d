//! The data folder of a replica: names of its files, the contexts that its keys are sealed in, and its
//! configuration file as `palyra cluster init` and `palyrad join` first write it.
//!
//! What never lives here: reading or writing any of them. Both programs that make a data folder share this
//! file, so that they can't make two kinds.
//!
//! ```text
//! palyrad.toml               configuration
//! kek.key                    the cluster's key encryption key; mode 0600
//! tls/authority.key.sealed   this replica's issuing key, PKCS#8, sealed under the KEK
//! tls/authority.pem          certificate of that key, signed by the root
//! tls/root.pem               the cluster's root certificates
//! genesis.pb                 the cluster's first log entry; only in the first replica, until it is committed
//! tls/keys/                  keys of further authorities of this replica, sealed; by the hash of their public half
//! peers.cache                where the other replicas were last seen; disposable
//! palyrad.lock               held by the running process
//! started                    empty; there once the replica has a database: from then on it never starts without
//! db/                        RocksDB: log, votes and state
//! ```

/// The configuration file.
pub const CONFIG: &str = "palyrad.toml";
/// The cluster's key encryption key; mode 0600.
pub const KEK: &str = "kek.key";
/// Folder of the certificates and the sealed key; mode 0700.
pub const TLS_DIR: &str = "tls";
/// The replica's issuing key, sealed for [`crate::Purpose::ReplicaKey`] in [`authority_context`]; mode 0600.
pub const AUTHORITY_KEY: &str = "tls/authority.key.sealed";
/// The certificate of the replica's issuing key, PEM.
pub const AUTHORITY_CERT: &str = "tls/authority.pem";
/// The cluster's root certificate, PEM.
pub const ROOT_CERT: &str = "tls/root.pem";
/// Folder of the keys of older and newer authorities of the replica, sealed as [`AUTHORITY_KEY`]; mode 0700.
pub const KEYS_DIR: &str = "tls/keys";
/// The encoded genesis envelope; removed once it is committed.
pub const GENESIS: &str = "genesis.pb";
/// Where the other replicas were last seen.
pub const PEERS: &str = "peers.cache";
/// Lock of the running process.
pub const LOCK: &str = "palyrad.lock";
/// Mark of a replica that has run: it has voted, and must not start again without its [`DB`].
pub const STARTED: &str = "started";
/// Folder of the database.
pub const DB: &str = "db";
/// Label of the PEM blocks in [`AUTHORITY_CERT`] and [`ROOT_CERT`].
pub const CERTIFICATE_LABEL: &str = "CERTIFICATE";

/// Offset of the gRPC port for nodes and operators from the base port.
pub const NODE_PORT: u16 = 1;
/// Offset of the enrolment port from the base port.
pub const ENROL_PORT: u16 = 2;
/// Offset of the QUIC port for nodes (UDP) from the base port.
pub const QUIC_PORT: u16 = 3;
/// Offset of the port for other replicas from the base port.
pub const PEERS_PORT: u16 = 4;
/// Offset of the metrics and health port from the base port.
pub const METRICS_PORT: u16 = 5;
/// Base port when none is given.
pub const BASE_PORT: u16 = 7440;

/// The context that a cluster's root key is sealed in, for [`crate::Purpose::RootKey`].
pub fn root_context(cluster_id: &str) -> Vec<u8> {
    cluster_id.as_bytes().to_vec()
}

/// The context that a replica's issuing key is sealed in, for [`crate::Purpose::ReplicaKey`].
pub fn authority_context(cluster_id: &str, replica_id: u64) -> Vec<u8> {
    format!("{cluster_id}/replica/{replica_id}/authority").into_bytes()
}

/// One or more certificates (DER) as PEM blocks.
pub fn certificates_to_pem<C: AsRef<[u8]>>(ders: &[C]) -> String {
    ders.iter()
        .map(|der| pem::encode(&pem::Pem::new(CERTIFICATE_LABEL, der.as_ref().to_vec())))
        .collect()
}

/// A list of revoked certificates (DER) as a PEM block.
pub fn crl_to_pem(der: &[u8]) -> String {
    pem::encode(&pem::Pem::new("X509 CRL", der.to_vec()))
}

/// The certificates (DER) in PEM text, in order; blocks of other labels are passed over. Nothing when the
/// text is not PEM.
pub fn certificates_from_pem(text: &str) -> Option<Vec<Vec<u8>>> {
    let blocks = pem::parse_many(text).ok()?;
    Some(
        blocks
            .into_iter()
            .filter(|block| block.tag() == CERTIFICATE_LABEL)
            .map(pem::Pem::into_contents)
            .collect(),
    )
}

/// What a new replica's configuration file says.
#[derive(Debug, Clone)]
pub struct NewConfig<'a> {
    /// The cluster's id.
    pub cluster_id: &'a str,
    /// The cluster's trust domain.
    pub trust_domain: &'a str,
    /// The replica's id.
    pub replica_id: u64,
    /// The replica's name.
    pub name: &'a str,
    /// Address that it listens on.
    pub listen_host: &'a str,
    /// First of its six ports.
    pub base_port: u16,
    /// Host that others reach it at.
    pub advertise_host: &'a str,
}

/// `host:port` of a listener, `offset` behind the base port; an IPv6 address gets its brackets.
pub fn address(host: &str, base_port: u16, offset: u16) -> String {
    let port = base_port.saturating_add(offset);
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

/// The text of [`CONFIG`] for a new replica. Only what differs between replicas is set; the rest is named
/// with its default, as a comment.
pub fn render_config(new: &NewConfig<'_>) -> String {
    format!(
        "# One replica of a Palyra cluster. `palyrad check-config --config FILE` checks this file;\n\
         # docs/operations.md explains every key.\n\
         \n\
         [replica]\n\
         id = {id}\n\
         name = {name}\n\
         cluster_id = {cluster}\n\
         trust_domain = {domain}\n\
         # data_dir = \".\"   # relative to this file\n\
         \n\
         [listen]\n\
         host = {listen}\n\
         base_port = {port}   # +1 nodes and operators, +2 enrolment, +3 QUIC (UDP), +4 replicas, +5 metrics\n\
         \n\
         [advertise]\n\
         host = {advertise}\n\
         \n\
         [log]\n\
         level = \"info\"\n\
         format = \"text\"   # or json\n",
        id = new.replica_id,
        name = quoted(new.name),
        cluster = quoted(new.cluster_id),
        domain = quoted(new.trust_domain),
        listen = quoted(new.listen_host),
        port = new.base_port,
        advertise = quoted(new.advertise_host),
    )
}

/// A TOML basic string.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_escaped() {
        assert_eq!(quoted("r1"), "\"r1\"");
        assert_eq!(quoted("a\"b\\c\nd"), "\"a\\\"b\\\\c\\u000Ad\"");
    }

    #[test]
    fn addresses_bracket_ipv6() {
        assert_eq!(address("127.0.0.1", 7440, NODE_PORT), "127.0.0.1:7441");
        assert_eq!(address("::1", 7440, PEERS_PORT), "[::1]:7444");
        assert_eq!(address("[::1]", 7440, PEERS_PORT), "[::1]:7444");
        assert_eq!(address("host.example", 65535, METRICS_PORT), "host.example:65535");
    }

    #[test]
    fn certificates_survive_pem() {
        let ders = vec![vec![1u8, 2, 3], vec![4; 200]];
        assert_eq!(certificates_from_pem(&certificates_to_pem(&ders)), Some(ders));
        assert_eq!(certificates_from_pem("no pem"), Some(vec![]));
    }
}
