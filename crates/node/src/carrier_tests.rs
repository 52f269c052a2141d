//! Which way is taken when, and what a failure of QUIC costs.

use palyra_client::ConnectErrorKind;

use super::*;

fn replica(quic_addr: &str) -> KnownReplica {
    KnownReplica {
        replica_id: 2,
        node_addr: "r2:7441".to_owned(),
        enrol_addr: String::new(),
        quic_addr: quic_addr.to_owned(),
    }
}

#[test]
fn the_owners_choice_is_one_of_three() {
    assert_eq!(Choice::parse("quic").unwrap(), Choice::Quic);
    let error = Choice::parse("pigeon").unwrap_err();
    assert_eq!((error.code.as_str(), error.kind), ("N0701", Kind::Usage));
    assert!(error.message.contains("pigeon"));
}

#[test]
fn quic_comes_first_where_it_is_offered_and_wanted() {
    let now = Instant::now();
    let way = |choice, addr: &str| Carrier::new(choice).way(&replica(addr), now);
    assert_eq!(way(Choice::Auto, "r2:7443"), Way::Either);
    assert_eq!(way(Choice::Quic, "r2:7443"), Way::Quic);
    assert_eq!(
        way(Choice::Grpc, "r2:7443"),
        Way::Grpc(String::new()),
        "no fallback: it was asked for"
    );
    let Way::Grpc(why) = way(Choice::Auto, "") else {
        panic!("there is no QUIC")
    };
    assert!(why.contains("replica 2 offers no QUIC"), "{why}");
}

#[test]
fn a_failure_is_remembered_for_longer_each_time_and_probed_when_its_time_is_over() {
    let (mut carrier, here) = (Carrier::new(Choice::Auto), replica("r2:7443"));
    let mut now = Instant::now();
    let mut pause = FIRST;
    for _ in 0..10 {
        let why = carrier.failed(&here.quic_addr, "no answer", now);
        assert_eq!(why, "QUIC to r2:7443: no answer");
        assert_eq!(carrier.way(&here, now), Way::Grpc(why));
        assert!(!carrier.is_probe_due(&here, now + pause - Duration::from_millis(1)));
        assert_eq!(
            carrier.way(&replica("r3:7443"), now),
            Way::Either,
            "of another replica nothing is known"
        );
        now += pause;
        assert!(carrier.is_probe_due(&here, now));
        assert_eq!(carrier.way(&here, now), Way::Either);
        pause = (pause * 2).min(LAST);
    }
    assert_eq!(pause, LAST);
    carrier.works(&here.quic_addr);
    assert!(!carrier.is_probe_due(&here, now));
    let why = carrier.failed(&here.quic_addr, "no answer", now);
    assert_eq!(carrier.way(&here, now + FIRST / 2), Way::Grpc(why));
    assert_eq!(
        carrier.way(&here, now + FIRST),
        Way::Either,
        "from the beginning again"
    );
}

#[test]
fn a_stream_that_works_ends_the_row_of_broken_ones() {
    let broken = End::Lost {
        why: "a proxy".to_owned(),
        no_stream: true,
    };
    let mut carrier = Carrier::default();
    for _ in 1..BROKEN_STREAMS {
        carrier.stream_ended(&broken);
    }
    carrier.stream_ended(&End::lost("the replica went"));
    for _ in 1..BROKEN_STREAMS {
        carrier.stream_ended(&broken);
        assert_eq!(carrier.poll_until(), None);
    }
    carrier.stream_ended(&broken);
    assert!(carrier.poll_until().is_some());
    // When its time is over, one stream is tried.
    carrier.poll_until = None;
    carrier.stream_ended(&broken);
    assert!(carrier.poll_until().is_some());
}

/// A link whose ways work or not.
struct Ways {
    grpc: bool,
}

fn nobody(address: &str) -> ConnectError {
    ConnectError {
        address: address.to_owned(),
        kind: ConnectErrorKind::Unreachable,
        cause: "nobody".to_owned(),
        chain: None,
    }
}

impl Link for Ways {
    fn dial(&mut self, address: &str) -> crate::link::Dialling {
        let (works, refused) = (self.grpc, nobody(address));
        let channel = tonic::transport::Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        Box::pin(async move {
            if works {
                Ok(Connection::Grpc(channel))
            } else {
                Err(refused)
            }
        })
    }

    fn dial_quic(&mut self, address: &str) -> crate::link::Dialling {
        let refused = nobody(address);
        Box::pin(async move { Err(refused) })
    }

    fn served(&mut self) -> Result<()> {
        Ok(())
    }

    fn refused(&mut self) -> bool {
        false
    }

    fn renew_due(&self) -> bool {
        false
    }

    fn renew(&mut self, _: Connection) -> futures::future::BoxFuture<'static, Result<()>> {
        Box::pin(std::future::pending())
    }

    fn renewed(&mut self, _: Result<()>) -> bool {
        false
    }

    fn trust_generation(&self) -> u64 {
        0
    }

    fn trust(&mut self, _: u64, _: Vec<Vec<u8>>) -> Result<()> {
        Ok(())
    }

    fn describe(&self) -> (String, u64) {
        (String::new(), u64::MAX)
    }
}

#[tokio::test]
async fn a_fallback_has_its_reason_and_a_dead_replica_is_no_reason() {
    let here = replica("r2:7443");
    let dialled = dial(&mut Ways { grpc: true }, &here, &Way::Either)
        .await
        .ok()
        .unwrap();
    assert_eq!(dialled.quic_failed.as_deref(), Some("nobody"));
    assert_eq!(dialled.connection.transport(), "stream");
    let nowhere = dial(&mut Ways { grpc: false }, &here, &Way::Either).await;
    assert_eq!(nowhere.err().unwrap().address, "r2:7441");
    let only = dial(&mut Ways { grpc: true }, &here, &Way::Quic).await;
    assert_eq!(only.err().unwrap().address, "r2:7443", "gRPC was not asked for");
}
