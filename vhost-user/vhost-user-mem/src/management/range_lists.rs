//! Answers that are lists of ranges, written piece by piece.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use management_api::Range;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio_stream::wrappers::ReceiverStream;

use super::ErrorAnswer;

/// What a piece has, at least, unless it is the last one, bytes.
const PIECE: usize = 32 << 10;

/// Ranges on their way out.
pub type Ranges = Box<dyn Iterator<Item = Range> + Send>;

/// Ranges of one moment, however many there are, which can be walked more than once.
#[derive(Clone)]
pub struct RangeList(Arc<dyn Fn() -> Ranges + Send + Sync>);

impl RangeList {
    /// The ranges that `walk` gives, the same ones each time.
    pub fn new(walk: impl Fn() -> Ranges + Send + Sync + 'static) -> Self {
        Self(Arc::new(walk))
    }

    /// The ranges.
    pub fn walk(&self) -> Ranges {
        (self.0)()
    }
}

/// Lists of ranges by name; one that is not known is null.
pub(super) type Fields = Vec<(&'static str, Option<RangeList>)>;

/// An object with the lists, sent piece by piece: the answer holds two of them and what the lists do.
/// It keeps `place` until it is sent or the client has gone.
///
/// The lists are walked twice, so that the answer has a length.
pub(super) async fn answer(
    fields: Fields,
    place: impl Send + 'static,
) -> Result<Response, ErrorAnswer> {
    let measured = spawn_blocking(move || (Text::new(&fields).length(), Text::new(&fields)));
    let (length, mut text) = measured.await.map_err(ErrorAnswer::of_failed_call)?;
    let (sender, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(1);
    tokio::spawn(async move {
        let _place = place;
        // A piece of a large region in which little is plugged takes a long look at the bitmap.
        while let Ok((Some(piece), rest)) = spawn_blocking(move || (text.next_piece(), text)).await
        {
            text = rest;
            if sender.send(Ok(piece.into())).await.is_err() {
                return;
            }
        }
    });
    let body = Body::from_stream(ReceiverStream::new(receiver));
    let head = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (header::CONTENT_LENGTH, length.into()),
    ];
    Ok((HeaderMap::from_iter(head), body).into_response())
}

/// The JSON text of an object with lists.
struct Text {
    fields: Vec<(&'static str, Option<Ranges>)>,
    /// Index of the field that is being written.
    field: usize,
    /// Whether its name was written, and whether a range of it was.
    begun: bool,
    written: bool,
}

impl Text {
    fn new(fields: &Fields) -> Self {
        let walk = |(name, list): &(&'static str, Option<RangeList>)| {
            (*name, list.as_ref().map(RangeList::walk))
        };
        Self { fields: fields.iter().map(walk).collect(), field: 0, begun: false, written: false }
    }

    /// How long it is, bytes.
    fn length(mut self) -> u64 {
        std::iter::from_fn(|| self.next_piece()).map(|piece| piece.len() as u64).sum()
    }

    /// The next piece of the text; `None` after the last one.
    fn next_piece(&mut self) -> Option<Vec<u8>> {
        if self.field > self.fields.len() {
            return None;
        }
        let mut piece = Vec::with_capacity(PIECE + 128);
        while piece.len() < PIECE && self.field <= self.fields.len() {
            self.write(&mut piece);
        }
        Some(piece)
    }

    /// Writes a range, or what stands between them.
    fn write(&mut self, piece: &mut Vec<u8>) {
        let Some((name, ranges)) = self.fields.get_mut(self.field) else {
            piece.extend(if self.fields.is_empty() { &b"{}"[..] } else { &b"}"[..] });
            self.field += 1;
            return;
        };
        if !self.begun {
            self.begun = true;
            piece.push(if self.field == 0 { b'{' } else { b',' });
            piece.extend(Value::from(*name).to_string().bytes());
            piece.extend(if ranges.is_some() { &b":["[..] } else { &b":null"[..] });
        }
        match ranges.as_mut().and_then(Iterator::next) {
            Some(Range { offset, size }) => {
                if self.written {
                    piece.push(b',');
                }
                piece.extend(format!("{{\"offset\":{offset},\"size\":{size}}}").bytes());
                self.written = true;
            }
            None => {
                if ranges.is_some() {
                    piece.push(b']');
                }
                self.field += 1;
                (self.begun, self.written) = (false, false);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use management_api::{Blocks, Resident};
    use proptest::prelude::*;

    fn list(ranges: &[Range]) -> Option<RangeList> {
        let ranges = ranges.to_vec();
        Some(RangeList::new(move || Box::new(ranges.clone().into_iter())))
    }

    fn text(fields: Fields) -> String {
        let mut text = Vec::new();
        let mut lists = Text::new(&fields);
        while let Some(piece) = lists.next_piece() {
            assert!(piece.len() < PIECE + 128, "a piece of {} bytes", piece.len());
            text.extend(piece);
        }
        assert_eq!(Text::new(&fields).length(), text.len() as u64);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn a_list_that_is_not_known_is_null() {
        assert_eq!(text(vec![("resident", None)]), r#"{"resident":null}"#);
        assert_eq!(text(Vec::new()), "{}");
    }

    proptest! {
        #[test]
        fn pieces_are_together_what_serde_writes(
            plugged in prop::collection::vec(any::<(u64, u64)>(), 0..3000),
            discarded in prop::collection::vec(any::<(u64, u64)>(), 0..3),
        ) {
            let ranges = |ranges: Vec<(u64, u64)>| -> Vec<Range> {
                ranges.into_iter().map(|(offset, size)| Range { offset, size }).collect()
            };
            let blocks = Blocks { plugged: ranges(plugged), discarded: ranges(discarded) };
            let lists = vec![
                ("plugged", list(&blocks.plugged)),
                ("discarded", list(&blocks.discarded)),
            ];
            prop_assert_eq!(text(lists), serde_json::to_string(&blocks).unwrap());
            let resident = Resident { resident: Some(blocks.plugged) };
            let lists = vec![("resident", list(resident.resident.as_ref().unwrap()))];
            prop_assert_eq!(text(lists), serde_json::to_string(&resident).unwrap());
        }
    }
}
