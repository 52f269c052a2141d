//! `JournalService`: operators read the journal, follow it, and have its chain recomputed.

use std::pin::Pin;

use futures::{Stream, StreamExt};
use palyra_control::{Caller, TailOptions, TailPart};
use palyra_proto::journal::v1 as wire;
use palyra_proto::journal::v1::journal_service_server::JournalService;
use palyra_state::access::Role;
use palyra_state::journal::audience;
use palyra_state::{Cursor, Row};
use tonic::{Request, Response, Status};

use super::{Gateway, connection, identity};
use crate::{convert, events};

#[tonic::async_trait]
impl JournalService for Gateway {
    type TailStream = Pin<Box<dyn Stream<Item = Result<wire::TailResponse, Status>> + Send>>;
    type StreamEventsStream = Pin<Box<dyn Stream<Item = Result<wire::StreamEventsResponse, Status>> + Send>>;

    async fn tail(&self, request: Request<wire::TailRequest>) -> Result<Response<Self::TailStream>, Status> {
        self.operator(&request, Role::Viewer)?;
        let peer = identity(&request)?;
        let ask = request.into_inner();
        let options = TailOptions {
            after: ask.after.map(|after| Cursor {
                index: after.index,
                ordinal: after.ordinal,
            }),
            follow: ask.follow,
            last: ask.last,
            action_prefix: ask.action_prefix,
            subject: ask.subject,
            read: convert::read_options(ask.read),
        };
        let tail = self
            .control
            .tail(options)
            .await
            .map_err(|error| self.fail(error))?;
        let gateway = self.clone();
        let parts = futures::stream::unfold(Some(tail), move |tail| {
            let (gateway, peer) = (gateway.clone(), peer.clone());
            async move {
                let mut tail = tail?;
                let part = tail.next().await?;
                // Whoever lost its role meanwhile reads no further.
                match gateway.control.admit_operator_local(&peer) {
                    Ok(Caller::Operator { role, .. }) => Some((Ok(response(part, role)), Some(tail))),
                    Ok(_) => None,
                    Err(error) => Some((Err(gateway.fail(error)), None)),
                }
            }
        });
        Ok(Response::new(Box::pin(parts)))
    }

    async fn stream_events(
        &self,
        request: Request<wire::StreamEventsRequest>,
    ) -> Result<Response<Self::StreamEventsStream>, Status> {
        let peer = identity(&request)?;
        let guard = connection(&request)?.guard.get().copied();
        let ask = events::request(request.into_inner(), guard);
        let feed = self
            .control
            .operator_events(&peer, ask)
            .await
            .map_err(|error| self.fail(error))?;
        let (gateway, cluster_id) = (self.clone(), self.control.cluster_id().to_string());
        let messages = events::stream(feed, move |event| events::event(event, cluster_id.clone()))
            .map(move |message| message.map_err(|error| gateway.fail(error)));
        Ok(Response::new(Box::pin(messages)))
    }

    async fn verify(
        &self,
        request: Request<wire::VerifyRequest>,
    ) -> Result<Response<wire::VerifyResponse>, Status> {
        self.operator(&request, Role::Viewer)?;
        let read = convert::read_options(request.into_inner().read);
        let verified = self
            .control
            .verify_journal(read)
            .await
            .map_err(|error| self.fail(error))?;
        let read = convert::read_info(verified.read);
        Ok(Response::new(match verified.outcome {
            Ok(summary) => wire::VerifyResponse {
                intact: true,
                rows: summary.rows,
                first: Some(convert::cursor(summary.first)),
                last: Some(convert::cursor(summary.last)),
                head: summary.head.to_bytes().to_vec().into(),
                broken_at: None,
                problem: String::new(),
                read,
            },
            Err(broken) => wire::VerifyResponse {
                intact: false,
                broken_at: Some(convert::cursor(broken.cursor)),
                problem: broken.to_string(),
                read,
                ..wire::VerifyResponse::default()
            },
        }))
    }
}

fn response(part: TailPart, role: Role) -> wire::TailResponse {
    let seen = |row: Row| match role {
        Role::Viewer => audience::for_viewer(&row),
        Role::Operator | Role::Admin => row,
    };
    wire::TailResponse {
        rows: part.rows.into_iter().map(seen).map(events::row).collect(),
        gap_first: part.gap_first.map(convert::cursor),
        read: convert::read_info(part.read),
    }
}
