//! What the device discards while the image is written: it is saved before its memory goes.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use ram_discard::{FreezeLost, RamDiscardListener, RamDiscardManager, Section};

use super::image::Image;
use crate::error::MigrationError;

/// The listener at one manager. What is plugged meanwhile is not in the image, and needs nothing.
pub(super) struct Discards {
    /// Gone once the snapshot has ended.
    image: Weak<Image>,
    /// Blocks by their number in the image, and where in each the manager's region starts.
    regions: Vec<(usize, u64)>,
    patience: Patience,
}

impl Discards {
    /// For the blocks that `manager` answers for.
    pub(super) fn new(image: &Arc<Image>, manager: &Arc<dyn RamDiscardManager>) -> Self {
        let regions = image.blocks().iter().enumerate().filter_map(|(index, saved)| {
            let (start, other) = saved.block().discard_region()?;
            Arc::ptr_eq(manager, &other).then_some((index, start))
        });
        let patience = Patience::new(manager.patience(), Instant::now());
        Self { image: Arc::downgrade(image), regions: regions.collect(), patience }
    }
}

impl RamDiscardListener for Discards {
    fn name(&self) -> &str {
        "background snapshot"
    }

    /// It was discarded at the instant of the image, or has been saved since.
    fn notify_populate(&mut self, _section: Section) -> Result<(), String> {
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        self.notify_discard_all(&[section]);
    }

    fn notify_discard_all(&mut self, sections: &[Section]) {
        let Some(image) = self.image.upgrade() else { return };
        let deadline = self.patience.begin(Instant::now());
        for (saved, start) in &self.regions {
            let saved = &image.blocks()[*saved];
            let Some(used) = saved.block().used() else { continue };
            for section in sections {
                let range = section.in_block(*start).and_then(|range| range.intersection(used));
                if let Some(range) = range {
                    image.save_before_discard(saved, range, deadline);
                }
            }
        }
        self.patience.end(Instant::now());
    }

    fn notify_lost(&mut self, reason: &str) {
        if let Some(image) = self.image.upgrade() {
            image.fail(MigrationError::FreezeLost(FreezeLost(reason.to_owned())));
        }
    }
}

/// For how long changes are kept waiting: half of what their manager bears, which others may need as well.
/// It is regained as time passes in which none waits.
struct Patience {
    whole: Option<Duration>,
    used: Duration,
    /// When the last change, or this one, began or ended to wait.
    since: Instant,
}

impl Patience {
    fn new(patience: Option<Duration>, now: Instant) -> Self {
        let whole = patience.map(|patience| patience / 2);
        Self { whole, used: Duration::ZERO, since: now }
    }

    /// A change waits from now on; until when it may.
    fn begin(&mut self, now: Instant) -> Option<Instant> {
        self.used = self.used.saturating_sub(now.saturating_duration_since(self.since));
        self.since = now;
        self.whole.map(|whole| now + whole.saturating_sub(self.used))
    }

    /// It waits no longer.
    fn end(&mut self, now: Instant) {
        self.used += now.saturating_duration_since(self.since);
        self.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_wait_is_half_of_what_is_borne_and_regained_while_none_waits() {
        let start = Instant::now();
        let ms = Duration::from_millis;
        let mut patience = Patience::new(Some(ms(1000)), start);
        assert_eq!(
            patience.begin(start + ms(5000)),
            Some(start + ms(5500)),
            "never more than half"
        );
        patience.end(start + ms(5300));
        // The next part of the change.
        assert_eq!(patience.begin(start + ms(5300)), Some(start + ms(5500)));
        patience.end(start + ms(5900));
        assert_eq!(patience.begin(start + ms(5900)), Some(start + ms(5900)), "all is used");
        patience.end(start + ms(5900));
        let later = start + ms(6900);
        assert_eq!(patience.begin(later), Some(later + ms(500)));
        assert_eq!(Patience::new(None, start).begin(start), None);
    }
}
