//! The devices of both sides: a virtio-mem device with QEMU's two sections, and one that has a field
//! of each kind.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use migration::DeviceRegistry;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{DeviceState, Geometry, VirtioMem};
use virtio_mem::sections::{EARLY, NORMAL, VirtioMemState, properties};
use vmstate::{
    Access, Count, Described, Field, Reason, SliceAccess, StructArray, VmState, VmStateDevice,
};

use super::{BLOCK, BLOCKS, plugged};

/// The most ports of a [`Board`].
const PORTS_MAX: u64 = 70;

#[derive(Clone, Debug, Default, PartialEq)]
struct Port {
    speed: u32,
    mask: u16,
}

/// A device with a field of each kind.
#[derive(Clone, Debug, Default, PartialEq)]
struct Board {
    on: bool,
    revision: u32,
    serial: String,
    secret: Vec<u8>,
    nr_ports: u8,
    ports: Vec<Port>,
    lines: Vec<u64>,
    offset: i16,
    sum: u32,
    extra: u64,
}

type B = Field<Board>;

static PORT: VmState<Port> = VmState::new(
    "port",
    2,
    &[
        Field::u32("speed", Access::Mutable(|s: &Port| s.speed, |s, speed| s.speed = speed)),
        Field::u16("mask", Access::Mutable(|s: &Port| s.mask, |s, mask| s.mask = mask)).since(2),
    ],
);

const BY_PORTS: Count<Board> = Count::From { count: |s| u64::from(s.nr_ports), limit: PORTS_MAX };

static EXTRA: VmState<Board> = VmState::new(
    "board/extra",
    1,
    &[B::u64("extra", Access::Mutable(|s| s.extra, |s, extra| s.extra = extra))],
)
.needed(|s| s.extra != 0);

static BOARD: VmState<Board> = VmState::new(
    "board",
    2,
    &[
        B::bool("on", Access::Mutable(|s| s.on, |s, on| s.on = on)),
        B::u32("revision", Access::Immutable(|s| s.revision)),
        B::text("serial", 64, Access::Mutable(|s| s.serial.clone(), |s, serial| s.serial = serial)),
        B::unused(3),
        B::bytes(
            "secret",
            Count::Fixed(4),
            SliceAccess::Mutable(|s| &s.secret, |s, secret| s.secret = secret),
        ),
        B::u8("nr_ports", Access::Mutable(|s| s.nr_ports, |s, nr| s.nr_ports = nr)),
        B::structure(
            "ports",
            &StructArray {
                vmstate: &PORT,
                count: BY_PORTS,
                get: |s: &mut Board| &mut s.ports,
                make: |_| Port::default(),
                set: |s, ports| s.ports = ports,
            },
        ),
        B::bitmap(
            "lines",
            BY_PORTS,
            SliceAccess::Mutable(|s| &s.lines, |s, lines| s.lines = lines),
        ),
        B::i16("offset", Access::Mutable(|s| s.offset, |s, offset| s.offset = offset)).since(2),
        B::u32("sum", Access::DerivedChecked(|s| s.sum)),
    ],
)
.minimum_version(1)
.subsections(&[&EXTRA])
.post_load(|s, _| {
    s.sum = s.ports.iter().fold(0, |sum, port| sum ^ port.speed);
    Ok(())
});

/// A section of a device that becomes whatever fits its description.
struct Becomes<S> {
    state: Arc<Mutex<S>>,
    /// How often it became something.
    times: Arc<AtomicU32>,
}

impl<S: Clone + Send + 'static> VmStateDevice for Becomes<S> {
    type State = S;

    fn snapshot(&mut self) -> Result<S, Reason> {
        Ok(self.state.lock().unwrap().clone())
    }

    fn take_over(&mut self, state: S) -> Result<(), Reason> {
        *self.state.lock().unwrap() = state;
        self.times.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// The state of all devices.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct State {
    mem: VirtioMemState,
    board: Board,
}

impl State {
    fn of_mem(bitmap: u64) -> VirtioMemState {
        let region_size = BLOCKS as u64 * BLOCK;
        let geometry = Geometry::new(0, region_size, BLOCK, None).unwrap();
        let state = DeviceState {
            requested_size: region_size,
            usable_region_size: region_size,
            plugged: vec![bitmap],
        };
        let device = VirtioMem::restore(geometry, state).unwrap();
        VirtioMemState::of(&MemController::new(InitialState::volatile(device)))
    }

    /// Of a guest that has used them.
    pub(super) fn used() -> Self {
        let ports = vec![Port { speed: 0x0102_0304, mask: 0x0506 }, Port { speed: 7, mask: 8 }];
        let sum = ports.iter().fold(0, |sum, port| sum ^ port.speed);
        let board = Board {
            on: true,
            revision: 3,
            serial: "board-1".to_owned(),
            secret: vec![1, 2, 3, 4],
            nr_ports: 2,
            ports,
            lines: vec![0b10],
            offset: -2,
            sum,
            extra: 9,
        };
        Self { mem: Self::of_mem(plugged().0.words()[0]), board }
    }

    /// Of a guest that has not come yet.
    pub(super) fn fresh() -> Self {
        static FRESH: LazyLock<State> = LazyLock::new(|| {
            let board = Board { revision: 3, secret: vec![0; 4], ..Board::default() };
            State { mem: State::of_mem(0), board }
        });
        FRESH.clone()
    }
}

/// The devices of a machine.
pub(super) struct Devices {
    mem: Arc<Mutex<VirtioMemState>>,
    board: Arc<Mutex<Board>>,
    /// How often each section was taken over, or what it was before after that.
    times: [Arc<AtomicU32>; 3],
    pub(super) registry: DeviceRegistry,
}

impl Devices {
    pub(super) fn new(state: State) -> Self {
        let State { mem, board } = state;
        let (mem, board) = (Arc::new(Mutex::new(mem)), Arc::new(Mutex::new(board)));
        let times: [Arc<AtomicU32>; 3] = Default::default();
        let [early, normal, whole] = times.clone();
        let part = |times| Becomes { state: Arc::clone(&mem), times };
        let early = Described { vmstate: &EARLY, device: part(early) };
        let normal = Described { vmstate: &NORMAL, device: part(normal) };
        let whole = Becomes { state: Arc::clone(&board), times: whole };
        let whole = Described { vmstate: &BOARD, device: whole };
        let mut registry = DeviceRegistry::new(properties());
        registry.register("vmem0/virtio-mem-device-early", 0, Box::new(early)).unwrap();
        registry.register("vmem0/virtio-mem", 0, Box::new(normal)).unwrap();
        registry.register("board", 1, Box::new(whole)).unwrap();
        Self { mem, board, times, registry }
    }

    /// Fails unless all have become what came (and must have, if the guest is `taken`), or none has.
    pub(super) fn assert_all_or_none(&self, taken: bool) {
        let times = self.times.each_ref().map(|times| times.load(Ordering::Relaxed));
        if times == [1; 3] {
            return;
        }
        assert!(!taken, "the guest was taken, and devices {times:?} times");
        // Each that was taken over became again what it was before.
        assert!(times.iter().all(|times| times % 2 == 0), "{times:?}");
        let state = State {
            mem: self.mem.lock().unwrap().clone(),
            board: self.board.lock().unwrap().clone(),
        };
        assert_eq!(state, State::fresh());
    }
}
