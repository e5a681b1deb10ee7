//! The device as the specification tells it, one `bool` a block.

use std::collections::BTreeSet;
use std::ops::Range;

use virtio_mem::controller::FreezeHolder;
use virtio_mem::device::{BlockSpan, BlockState, Request, Response, USABLE_SLACK};

use super::{ADDR, BLOCK, NR, REGION};

pub(super) struct Model {
    pub(super) plugged: Vec<bool>,
    pub(super) requested: u64,
    pub(super) usable: u64,
    /// The request that was executed and not answered.
    pub(super) journal: Option<Request>,
    pub(super) mapped: bool,
    frozen: BTreeSet<FreezeHolder>,
    reset_pending: bool,
}

fn fitting(requested: u64) -> u64 {
    if requested == 0 { 0 } else { (requested + USABLE_SLACK).min(REGION) }
}

impl Model {
    pub(super) fn new(requested: u64) -> Self {
        Self {
            plugged: vec![false; NR],
            requested,
            usable: fitting(requested),
            journal: None,
            mapped: false,
            frozen: BTreeSet::new(),
            reset_pending: false,
        }
    }

    pub(super) fn is_frozen(&self) -> bool {
        !self.frozen.is_empty()
    }

    /// The blocks of a good span.
    fn blocks(&self, span: BlockSpan) -> Option<Range<usize>> {
        let (addr, block) = (i128::from(ADDR), i128::from(BLOCK));
        let start = i128::from(span.addr) - addr;
        let end = start + i128::from(span.nb_blocks) * block;
        let good =
            start >= 0 && start < end && end <= i128::from(self.usable) && start % block == 0;
        let index = |at: i128| usize::try_from(at / block).unwrap();
        good.then(|| index(start)..index(end))
    }

    /// Whether all blocks of a good span are in the state.
    fn all(&self, span: BlockSpan, plugged: bool) -> Option<Range<usize>> {
        self.blocks(span).filter(|blocks| !self.plugged[blocks.clone()].contains(&!plugged))
    }

    /// The answer to a request, whose change is made if it is ACK.
    pub(super) fn execute(
        &mut self,
        request: Request,
        store_fails: bool,
        refused: bool,
    ) -> Response {
        let again = self.journal == Some(request);
        match request {
            Request::Plug(span) => match self.all(span, false) {
                Some(blocks) => {
                    let after = self.plugged.iter().filter(|&&p| p).count() + blocks.len();
                    if after as u64 * BLOCK > self.requested {
                        return Response::Nack;
                    }
                    if self.is_frozen() || !self.mapped || refused || store_fails {
                        return Response::Busy;
                    }
                    self.plugged[blocks].fill(true);
                    self.journal = Some(request);
                    Response::Ack
                }
                None if again && self.all(span, true).is_some() => Response::Ack,
                None => Response::Error,
            },
            Request::Unplug(span) => match self.all(span, true) {
                Some(blocks) => {
                    if self.is_frozen() || !self.mapped || store_fails {
                        return Response::Busy;
                    }
                    self.plugged[blocks].fill(false);
                    self.journal = Some(request);
                    Response::Ack
                }
                None if again && self.all(span, false).is_some() => {
                    // Its memory must be given back before it is answered.
                    if self.mapped { Response::Ack } else { Response::Busy }
                }
                None => Response::Error,
            },
            Request::UnplugAll => {
                let nothing = !self.plugged.contains(&true);
                if store_fails || !nothing && (self.is_frozen() || !self.mapped) {
                    return Response::Busy;
                }
                self.unplug_all();
                Response::Ack
            }
            Request::State(span) => match self.blocks(span) {
                None => Response::Error,
                Some(blocks) => {
                    let blocks = &self.plugged[blocks];
                    Response::AckState(match (blocks.contains(&true), blocks.contains(&false)) {
                        (true, false) => BlockState::Plugged,
                        (false, _) => BlockState::Unplugged,
                        (true, true) => BlockState::Mixed,
                    })
                }
            },
            Request::Unsupported(_) => Response::Error,
        }
    }

    fn unplug_all(&mut self) {
        self.plugged.fill(false);
        self.usable = fitting(self.requested);
        self.journal = None;
    }

    /// Whether the size is good, which is requested then.
    pub(super) fn resize(&mut self, size: u64) -> bool {
        let good = size.is_multiple_of(BLOCK) && size <= REGION;
        if good {
            self.requested = size;
            self.usable = self.usable.max(fitting(size));
        }
        good
    }

    pub(super) fn freeze(&mut self, holder: FreezeHolder, active: bool) {
        if active {
            self.frozen.insert(holder);
        } else if self.frozen.remove(&holder)
            && self.frozen.is_empty()
            && std::mem::take(&mut self.reset_pending)
        {
            self.unplug_all();
        }
    }

    /// Whether it is done at once.
    pub(super) fn system_reset(&mut self) -> bool {
        if self.is_frozen() {
            self.reset_pending = true;
            return false;
        }
        self.unplug_all();
        true
    }
}
