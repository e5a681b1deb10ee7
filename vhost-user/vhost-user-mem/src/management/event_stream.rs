//! Server-sent events for one reader.

use std::convert::Infallible;

use axum::response::sse;
use management_api::Event;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::caller::Caller;

/// Events that wait for the reader here; those behind them wait in the bounded channel of the
/// device, which drops the oldest.
const AHEAD: usize = 16;

/// Events as they go to a reader: the current state first, then every change, until the reader
/// has gone or the server ends.
///
/// A change between reading the state and the first event is sent, too, since the subscription
/// is older than the state.
pub(super) fn follow(
    caller: Caller,
    shutdown: watch::Receiver<bool>,
    permit: OwnedSemaphorePermit,
) -> ReceiverStream<Result<sse::Event, Infallible>> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        forward(caller, shutdown, &sender).await;
        drop(permit);
    });
    ReceiverStream::new(receiver)
}

type Sender = mpsc::Sender<Result<sse::Event, Infallible>>;

async fn forward(caller: Caller, mut shutdown: watch::Receiver<bool>, sender: &Sender) {
    let mut events = caller.subscribe();
    if send_state(&caller, sender).await.is_err() {
        return;
    }
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            () = sender.closed() => return,
            _ = shutdown.wait_for(|end| *end) => return,
        };
        let sent = match event {
            Ok(event) => sender.send(Ok(encode(event))).await.map_err(drop),
            Err(RecvError::Lagged(missed)) => {
                let comment = format!("{missed} events missed; the state follows");
                match sender.send(Ok(sse::Event::default().comment(comment))).await {
                    Ok(()) => send_state(&caller, sender).await,
                    Err(_) => Err(()),
                }
            }
            Err(RecvError::Closed) => return,
        };
        if sent.is_err() {
            return;
        }
    }
}

async fn send_state(caller: &Caller, sender: &Sender) -> Result<(), ()> {
    let device = caller.call(|management| management.device()).await.map_err(drop)?;
    for event in Event::state(&device) {
        sender.send(Ok(encode(event))).await.map_err(drop)?;
    }
    Ok(())
}

fn encode(event: Event) -> sse::Event {
    sse::Event::default().event(event.name()).data(event.data().to_string())
}
