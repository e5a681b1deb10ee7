//! Events of the device, and their form on the wire.

use serde_json::{Value, json};

use crate::DeviceInfo;

/// A change of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
            _ => None,
        }
    }

    /// The events that tell the state of a device to someone who knows nothing of it.
    pub fn state(device: &DeviceInfo) -> [Self; 4] {
        [
            Self::RequestedSize(device.requested_size),
            Self::PluggedSize(device.plugged_size),
            Self::Migration(device.migration_active),
            if device.connected { Self::Connected } else { Self::Disconnected },
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wire_form_comes_back() {
        for event in [
            Event::RequestedSize(u64::MAX),
            Event::PluggedSize(0),
            Event::Migration(true),
            Event::Connected,
            Event::Disconnected,
        ] {
            assert_eq!(Event::parse(event.name(), &event.data().to_string()), Some(event));
        }
        assert_eq!(Event::parse("later-addition", "{}"), None);
        assert_eq!(Event::parse("plugged-size", "{}"), None);
        assert_eq!(Event::parse("plugged-size", "no json"), None);
    }
}
