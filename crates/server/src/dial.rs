//! One client connection to an enrol listener, known only by the pin in a join token.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use palyra_pki::tls::{ALPN_H2, Clock, SeenServer, chain_error, client_pinned};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};

/// Time for TCP and TLS together.
const CONNECT: Duration = Duration::from_secs(5);

/// A connection and what binds a transcript to it.
pub(crate) struct Dialled {
    /// The connection; it does not reconnect.
    pub(crate) channel: Channel,
    /// `tls-server-end-point` of the server's certificate.
    pub(crate) end_point: [u8; 32],
}

/// Connects to a server whose chain must end in the pinned root.
pub(crate) async fn pinned(address: SocketAddr, pin: [u8; 32], cluster_id: &str) -> anyhow::Result<Dialled> {
    let seen = SeenServer::new();
    let clock = Clock::new(palyra_platform::wall_ms);
    let config = client_pinned(pin, cluster_id, Arc::clone(&seen), &clock, &[ALPN_H2])?;
    let connect = async {
        let tcp = TcpStream::connect(address).await?;
        tcp.set_nodelay(true)?;
        TlsConnector::from(config)
            .connect(ServerName::IpAddress(address.ip().into()), tcp)
            .await
    };
    let tls = tokio::time::timeout(CONNECT, connect)
        .await
        .map_err(|_| anyhow::anyhow!("no connection within {} s", CONNECT.as_secs()))?
        .map_err(|error| explain(&error))?;
    let end_point = seen
        .end_point()
        .ok_or_else(|| anyhow::anyhow!("the server showed no certificate"))?;
    let mut once = Some(tls);
    let connector = tower::service_fn(move |_: Uri| {
        let tls = once
            .take()
            .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected));
        async move { tls.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://enrol.palyra")
        .connect_with_connector(connector)
        .await?;
    Ok(Dialled { channel, end_point })
}

/// The reason why a server's certificate was refused, when that is what a failed connection is about.
fn explain(error: &std::io::Error) -> anyhow::Error {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls.and_then(chain_error) {
        Some(refused) => anyhow::anyhow!("{refused}"),
        None => anyhow::anyhow!("{error}"),
    }
}
