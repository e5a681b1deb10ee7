use super::*;
use proptest::prelude::*;

const BLOCK: u64 = 2 << 20;
const ADDR: u64 = 0x1_4000_0000;
const REGION: u64 = 1 << 30;

fn device(requested_size: u64) -> VirtioMem {
    VirtioMem::new(Geometry::new(ADDR, REGION, BLOCK, None).unwrap(), requested_size).unwrap()
}

fn span(addr: u64, nb_blocks: u16) -> BlockSpan {
    BlockSpan { addr, nb_blocks }
}

/// Evaluates and applies, as a device does whose listeners refuse nothing.
fn execute(device: &mut VirtioMem, request: Request) -> Response {
    match device.evaluate(request) {
        Verdict::Answer(response) => response,
        Verdict::Change(change) => {
            device.apply(&change);
            Response::Ack
        }
    }
}

#[test]
fn bad_ranges_are_errors_for_every_request_that_names_blocks() {
    let device = device(128 << 20);
    let usable = device.usable_region_size();
    assert!(usable < REGION);
    let bad = [
        span(ADDR + 1, 1),
        span(ADDR + BLOCK / 2, 1),
        span(ADDR - BLOCK, 1),
        span(0, 1),
        span(ADDR + usable, 1),
        span(ADDR + usable - BLOCK, 2),
        span(ADDR, u16::try_from(usable / BLOCK).unwrap() + 1),
        span(ADDR, 0),
        span(ADDR + usable, 0),
        span(!(BLOCK - 1), 1),
        span(!(BLOCK - 1), 65535),
        span(1 << 63, 1),
        span(ADDR + usable + BLOCK, 1),
    ];
    for span in bad {
        for request in [Request::Plug(span), Request::Unplug(span), Request::State(span)] {
            assert_eq!(device.evaluate(request), Verdict::Answer(Response::Error), "{request:?}");
        }
    }
}

#[test]
fn plug_up_to_the_requested_size_is_acked_and_one_block_more_is_nacked() {
    let mut device = device(4 * BLOCK);
    assert_eq!(execute(&mut device, Request::Plug(span(ADDR, 5))), Response::Nack);
    assert_eq!(execute(&mut device, Request::Plug(span(ADDR, 4))), Response::Ack);
    assert_eq!(device.plugged_size(), 4 * BLOCK);
    assert_eq!(execute(&mut device, Request::Plug(span(ADDR + 4 * BLOCK, 1))), Response::Nack);
    device.set_requested_size(BLOCK).unwrap();
    assert_eq!(execute(&mut device, Request::Plug(span(ADDR + 4 * BLOCK, 1))), Response::Nack);
}

#[test]
fn plug_of_a_plugged_and_unplug_of_an_unplugged_block_are_errors() {
    for taken in 0..4 {
        let mut device = device(64 * BLOCK);
        execute(&mut device, Request::Plug(span(ADDR + taken * BLOCK, 1)));
        let before = device.state();
        assert_eq!(execute(&mut device, Request::Plug(span(ADDR, 4))), Response::Error);
        assert_eq!(execute(&mut device, Request::Unplug(span(ADDR, 4))), Response::Error);
        assert_eq!(device.state(), before);
    }
}

#[test]
fn usable_region_grows_with_requests_and_shrinks_at_unplug_all_only() {
    let mut device = device(0);
    assert_eq!(device.usable_region_size(), 0);
    device.set_requested_size(512 << 20).unwrap();
    assert_eq!(device.usable_region_size(), 768 << 20);
    device.set_requested_size(0).unwrap();
    assert_eq!(device.usable_region_size(), 768 << 20);
    device.set_requested_size(BLOCK).unwrap();
    assert_eq!(execute(&mut device, Request::UnplugAll), Response::Ack);
    assert_eq!(device.usable_region_size(), (256 << 20) + BLOCK);
}

#[test]
fn unplug_all_unplugs_everything_whatever_the_request_says_besides() {
    let mut device = device(64 * BLOCK);
    execute(&mut device, Request::Plug(span(ADDR, 7)));
    assert_eq!(execute(&mut device, Request::UnplugAll), Response::Ack);
    assert_eq!(device.plugged_size(), 0);
    assert_eq!(execute(&mut device, Request::UnplugAll), Response::Ack);
}

#[test]
fn state_tells_plugged_unplugged_and_mixed() {
    let mut device = device(64 * BLOCK);
    execute(&mut device, Request::Plug(span(ADDR + BLOCK, 2)));
    let state = |addr, nb| device.evaluate(Request::State(span(addr, nb)));
    let ack = |state| Verdict::Answer(Response::AckState(state));
    assert_eq!(state(ADDR + BLOCK, 2), ack(BlockState::Plugged));
    assert_eq!(state(ADDR + 3 * BLOCK, 5), ack(BlockState::Unplugged));
    assert_eq!(state(ADDR, 2), ack(BlockState::Mixed));
    assert_eq!(state(ADDR + 2 * BLOCK, 2), ack(BlockState::Mixed));
}

#[test]
fn bad_requested_sizes_are_refused_and_change_nothing() {
    let mut device = device(BLOCK);
    let before = device.state();
    assert!(device.set_requested_size(BLOCK + 1).is_err());
    assert!(device.set_requested_size(REGION + BLOCK).is_err());
    assert_eq!(device.state(), before);
    device.set_requested_size(REGION).unwrap();
}

#[test]
fn a_region_without_bytes_refuses_all_but_unplug_all() {
    let geometry = Geometry::new(ADDR, 0, BLOCK, None).unwrap();
    let mut device = VirtioMem::new(geometry, 0).unwrap();
    assert_eq!(execute(&mut device, Request::Plug(span(ADDR, 1))), Response::Error);
    assert_eq!(execute(&mut device, Request::State(span(ADDR, 1))), Response::Error);
    assert_eq!(execute(&mut device, Request::UnplugAll), Response::Ack);
    assert!(device.set_requested_size(BLOCK).is_err());
}

#[test]
fn each_broken_rule_of_saved_state_is_refused() {
    let mut device = device(64 * BLOCK);
    execute(&mut device, Request::Plug(span(ADDR, 3)));
    let geometry = *device.geometry();
    let good = device.state();
    assert_eq!(VirtioMem::restore(geometry, good.clone()).unwrap().state(), good);
    let broken = |change: &dyn Fn(&mut DeviceState)| {
        let mut state = good.clone();
        change(&mut state);
        VirtioMem::restore(geometry, state).unwrap_err()
    };
    assert!(matches!(broken(&|s| s.requested_size += 1), DeviceStateError::RequestedSize(_)));
    assert!(matches!(
        broken(&|s| s.usable_region_size = s.requested_size - BLOCK),
        DeviceStateError::UsableRegion { .. }
    ));
    assert!(matches!(
        broken(&|s| s.usable_region_size = REGION + BLOCK),
        DeviceStateError::UsableRegion { .. }
    ));
    assert!(matches!(broken(&|s| s.plugged.push(0)), DeviceStateError::Bitmap { .. }));
    assert_eq!(
        broken(&|s| *s.plugged.last_mut().unwrap() = 1 << 63),
        DeviceStateError::PluggedOutsideUsable { block: 511 }
    );
}

#[derive(Clone, Debug)]
enum Step {
    Guest(Request),
    Resize(u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    let addr = prop_oneof![
        8 => (0u64..600).prop_map(|block| ADDR + block * BLOCK),
        1 => any::<u64>(),
    ];
    let any_span = (addr, prop_oneof![8 => 0u16..80, 1 => any::<u16>()])
        .prop_map(|(addr, nb_blocks)| span(addr, nb_blocks));
    prop_oneof![
        5 => any_span.clone().prop_map(|s| Step::Guest(Request::Plug(s))),
        4 => any_span.clone().prop_map(|s| Step::Guest(Request::Unplug(s))),
        3 => any_span.prop_map(|s| Step::Guest(Request::State(s))),
        1 => Just(Step::Guest(Request::UnplugAll)),
        2 => (0u64..600).prop_map(|blocks| Step::Resize(blocks * BLOCK)),
        1 => any::<u64>().prop_map(Step::Resize),
    ]
}

/// The device as the specification tells it, one `bool` a block.
struct Model {
    plugged: Vec<bool>,
    requested: u64,
    usable: u64,
}

impl Model {
    fn expected(&mut self, request: Request) -> Response {
        let blocks = |span: BlockSpan| -> Option<Range<usize>> {
            let start = i128::from(span.addr) - i128::from(ADDR);
            let end = start + i128::from(span.nb_blocks) * i128::from(BLOCK);
            let inside = start >= 0 && end <= i128::from(self.usable) && start < end;
            let aligned = start.rem_euclid(i128::from(BLOCK)) == 0;
            let index = |at: i128| usize::try_from(at / i128::from(BLOCK)).unwrap();
            (inside && aligned).then(|| index(start)..index(end))
        };
        let total = self.plugged.iter().filter(|&&p| p).count() as u64;
        match request {
            Request::Plug(span) => match blocks(span) {
                Some(range) if !self.plugged[range.clone()].contains(&true) => {
                    if total + range.len() as u64 > self.requested / BLOCK {
                        return Response::Nack;
                    }
                    self.plugged[range].fill(true);
                    Response::Ack
                }
                _ => Response::Error,
            },
            Request::Unplug(span) => match blocks(span) {
                Some(range) if !self.plugged[range.clone()].contains(&false) => {
                    self.plugged[range].fill(false);
                    Response::Ack
                }
                _ => Response::Error,
            },
            Request::UnplugAll => {
                self.plugged.fill(false);
                self.usable = self.fitting(self.requested);
                Response::Ack
            }
            Request::State(span) => match blocks(span) {
                None => Response::Error,
                Some(range) => {
                    let some = self.plugged[range.clone()].contains(&true);
                    let all = !self.plugged[range].contains(&false);
                    Response::AckState(match (some, all) {
                        (_, true) => BlockState::Plugged,
                        (false, _) => BlockState::Unplugged,
                        _ => BlockState::Mixed,
                    })
                }
            },
            Request::Unsupported(_) => Response::Error,
        }
    }

    fn fitting(&self, requested: u64) -> u64 {
        if requested == 0 { 0 } else { (requested + (256 << 20)).min(REGION) }
    }
}

proptest! {
    #[test]
    fn agrees_with_the_naive_model(steps in prop::collection::vec(any_step(), 0..60)) {
        let mut device = device(64 * BLOCK);
        let mut model = Model { plugged: vec![false; 512], requested: 64 * BLOCK, usable: 0 };
        model.usable = model.fitting(model.requested);
        for step in steps {
            match step {
                Step::Guest(request) => {
                    let expected = model.expected(request);
                    prop_assert_eq!(execute(&mut device, request), expected);
                }
                Step::Resize(size) => {
                    let good = size % BLOCK == 0 && size <= REGION;
                    prop_assert_eq!(device.set_requested_size(size).is_ok(), good);
                    if good {
                        model.requested = size;
                        model.usable = model.usable.max(model.fitting(size));
                    }
                }
            }
            let config = device.config();
            let plugged = model.plugged.iter().filter(|&&p| p).count() as u64 * BLOCK;
            prop_assert_eq!(config.plugged_size, plugged);
            prop_assert_eq!(config.requested_size, model.requested);
            prop_assert_eq!(config.usable_region_size, model.usable);
            prop_assert!(config.usable_region_size >= config.requested_size);
            let restored = VirtioMem::restore(*device.geometry(), device.state()).unwrap();
            prop_assert_eq!(restored.config(), config);
        }
    }
}
