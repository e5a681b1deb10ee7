//! New channels that are not encrypted as those were that broke.

use super::incoming::{Vmm, receive_with, send_again};
use super::*;
use crate::channel::faulty::Faulty;

/// Hands out once a main channel in the clear with an urgent one that is encrypted, and notes why it is asked.
struct Mixed(Arc<Mutex<Vec<String>>>);

impl Reconnect for Mixed {
    fn reconnect(&mut self, error: &MigrationError) -> Option<Channels> {
        let mut asked = self.0.lock().unwrap();
        asked.push(error.to_string());
        let progress = Arc::new(Progress::new());
        let transport = || Faulty::new(UnixStream::pair().unwrap().0, 100);
        let main = Channel::over(Arc::new(transport()), Arc::clone(&progress));
        let urgent = Some(Channel::over(Arc::new(transport().encrypted()), progress));
        (asked.len() == 1).then_some(Channels { main, urgent })
    }
}

#[test]
fn a_recovery_over_channels_that_are_not_all_encrypted_or_none_is_refused_on_either_side() {
    let (from, _) = filled();
    let to = Side::new(&[1, 4, 5, 9]);
    let (near, far) = breaking(150_000).unwrap();
    let asked = [(); 2].map(|()| Arc::<Mutex<Vec<String>>>::default());
    let mixed = |side: usize| Box::new(Mixed(Arc::clone(&asked[side])));
    let there = receive_with(&to, Vmm::default(), far, None, mixed(1));
    let progress = Arc::new(Progress::new());
    let (sent, _) = send_again(None, &from, (near, None), mixed(0), &progress);
    let taken = there.thread.join().unwrap();
    for (outcome, asked) in [sent, taken].into_iter().zip(asked) {
        let asked = asked.lock().unwrap();
        assert_eq!(asked.len(), 2, "{asked:?}");
        let expected = "the channel for urgent pages is encrypted, and the main channel is not";
        assert!(asked[1].contains(expected), "{asked:?}");
        let error = outcome.unwrap_err().to_string();
        assert_eq!(error, asked[1]);
    }
}
