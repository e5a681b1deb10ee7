//! Events of the device, and their form on the wire.

use serde_json::{Value, json};

use crate::{DeviceInfo, Resize};

/// A change of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest is asked to plug this much.
    RequestedSize(u64),
    /// The guest has plugged this much.
    PluggedSize(u64),
    /// Migration began or ended.
    Migration(bool),
    /// A front-end connected.
    Connected,
    /// The front-end went.
    Disconnected,
    /// A resize moves again, is done, or stands still for another reason.
    Resize(Box<Resize>),
    /// This many bytes of unplugged memory were found to hold something, and discarded.
    Stray(u64),
}

impl Event {
    /// The name in the `event` field of a server-sent event.
    pub fn name(&self) -> &'static str {
        match self {
            Self::RequestedSize(_) => "requested-size",
            Self::PluggedSize(_) => "plugged-size",
            Self::Migration(_) => "migration",
            Self::Connected => "connected",
            Self::Disconnected => "disconnected",
            Self::Resize(_) => "resize",
            Self::Stray(_) => "stray",
        }
    }

    /// The object in its `data` field.
    pub fn data(&self) -> Value {
        match self {
            Self::RequestedSize(size) => json!({ "requested_size": size }),
            Self::PluggedSize(size) => json!({ "plugged_size": size }),
            Self::Migration(active) => json!({ "active": active }),
            Self::Connected => json!({ "connected": true }),
            Self::Disconnected => json!({ "connected": false }),
            Self::Resize(resize) => json!(resize),
            Self::Stray(size) => json!({ "swept_size": size }),
        }
    }

    /// The event with this name and data, if there is one.
    pub fn parse(name: &str, data: &str) -> Option<Self> {
        let data: Value = serde_json::from_str(data).ok()?;
        match name {
            "requested-size" => Some(Self::RequestedSize(data["requested_size"].as_u64()?)),
            "plugged-size" => Some(Self::PluggedSize(data["plugged_size"].as_u64()?)),
            "migration" => Some(Self::Migration(data["active"].as_bool()?)),
            "connected" => Some(Self::Connected),
            "disconnected" => Some(Self::Disconnected),
            "resize" => Some(Self::Resize(serde_json::from_value(data).ok()?)),
            "stray" => Some(Self::Stray(data["swept_size"].as_u64()?)),
            _ => None,
        }
    }

    /// The events that tell the state of a device to someone who knows nothing of it.
    pub fn state(device: &DeviceInfo) -> impl Iterator<Item = Self> + use<> {
        let resize = device.resize.clone().map(|resize| Self::Resize(Box::new(resize)));
        [
            Self::RequestedSize(device.requested_size),
            Self::PluggedSize(device.plugged_size),
            Self::Migration(device.migration_active),
            if device.connected { Self::Connected } else { Self::Disconnected },
        ]
        .into_iter()
        .chain(resize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Direction, LastRequest, ResizeState, StallKind, StallReason};

    fn stalled() -> Resize {
        Resize {
            state: ResizeState::Stalled,
            direction: Some(Direction::Shrink),
            remaining_size: 2 << 20,
            rate: None,
            expected_seconds: None,
            since: Some("2026-01-31T23:59:59Z".to_owned()),
            reason: Some(StallReason { kind: StallKind::Unmovable, text: "why".to_owned() }),
            last_request: Some(LastRequest {
                request_type: "UNPLUG".to_owned(),
                response: "ACK".to_owned(),
                at: "2026-01-31T23:59:58Z".to_owned(),
            }),
        }
    }

    #[test]
    fn a_reason_that_a_later_version_adds_is_an_unknown_one() {
        let kind: StallKind = serde_json::from_str(r#""later-addition""#).unwrap();
        assert_eq!(kind, StallKind::Unknown);
        assert_eq!(serde_json::to_string(&StallKind::NoFrontEnd).unwrap(), r#""no-front-end""#);
    }

    #[test]
    fn wire_form_comes_back() {
        for event in [
            Event::RequestedSize(u64::MAX),
            Event::PluggedSize(0),
            Event::Migration(true),
            Event::Connected,
            Event::Disconnected,
            Event::Resize(Box::new(stalled())),
            Event::Stray(4096),
        ] {
            assert_eq!(Event::parse(event.name(), &event.data().to_string()), Some(event));
        }
        assert_eq!(Event::parse("resize", "{}"), None);
        assert_eq!(Event::parse("later-addition", "{}"), None);
        assert_eq!(Event::parse("plugged-size", "{}"), None);
        assert_eq!(Event::parse("plugged-size", "no json"), None);
    }
}
