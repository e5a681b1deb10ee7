//! Memory that was used before it came to the device.

use super::*;

/// Memory of which the first 8 blocks hold something that the device knows nothing of.
fn used_memory() -> File {
    let file = memfd();
    file.write_all_at(&vec![1; 8 << 20], 0).unwrap();
    file
}

fn resident_of(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

#[test]
fn a_new_device_discards_what_its_memory_held_before_when_the_guest_runs() {
    let file = used_memory();
    let controller = MemController::new(InitialState::volatile(device(NR * BLOCK)));
    controller.set_memory(ram(&file)).unwrap();
    assert_eq!(resident_of(&file), 8 * BLOCK, "a state may still come");
    controller.running();
    assert_eq!(resident_of(&file), 0);
}

#[test]
fn a_block_that_is_plugged_first_is_zeros_whatever_its_memory_held() {
    let file = used_memory();
    let controller = MemController::new(InitialState::volatile(device(NR * BLOCK)));
    controller.set_memory(ram(&file)).unwrap();
    assert_eq!(controller.execute(plug(2, 2)), Response::Ack);
    let mut bytes = vec![1; 4 << 20];
    file.read_exact_at(&mut bytes, BLOCK).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
    assert_eq!(controller.execute(Request::UnplugAll), Response::Ack);
    assert_eq!(resident_of(&file), 0);
}

#[test]
fn a_guest_whose_memory_is_mapped_in_part_has_it_swept_once() {
    let file = used_memory();
    let controller = MemController::new(InitialState::volatile(device(NR * BLOCK)));
    let part = |from: u64, to: u64| {
        let (file, range) = (file.try_clone().unwrap(), (to - from) * BLOCK);
        Arc::new(
            RamBlock::new("mem".into(), ADDR + from * BLOCK, range, file, from * BLOCK).unwrap(),
        )
    };
    controller.set_memory(vec![part(0, 4)]).unwrap();
    assert_eq!(controller.execute(plug(0, 1)), Response::Ack);
    assert_eq!(resident_of(&file), 4 * BLOCK, "of what is not mapped");
    // Strays of the guest itself stay.
    file.write_all_at(&[1], 2 * BLOCK).unwrap();
    assert_eq!(controller.execute(plug(1, 1)), Response::Ack);
    assert_eq!(resident_of(&file), 4 * BLOCK + 4096);
    controller.set_memory(vec![part(0, 4), part(4, NR)]).unwrap();
    assert_eq!(resident_of(&file), 0);
}

#[test]
fn memory_that_came_before_a_state_stays_where_the_state_has_it_plugged() {
    let file = used_memory();
    let controller = MemController::new(InitialState::volatile(device(0)));
    controller.set_memory(ram(&file)).unwrap();
    let mut loaded = device(NR * BLOCK);
    loaded.apply(&Change::Plug(2..6));
    controller.load_state(loaded.state()).unwrap();
    assert_eq!(resident_of(&file), 4 * BLOCK);
    controller.running();
    assert_eq!(resident_of(&file), 4 * BLOCK);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 6 * BLOCK - 1).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn memory_that_is_mapped_later_is_swept_and_the_same_memory_is_not_swept_again() {
    let rig = rig();
    rig.execute(plug(0, 1));
    // What the guest touches without plugging it stays until it is unplugged or the VM is reset.
    rig.fill(0, 2);
    rig.controller.set_memory(ram(&rig.file)).unwrap();
    rig.controller.running();
    assert_eq!(rig.resident(), 2);
    let other = used_memory();
    rig.controller.set_memory(ram(&other)).unwrap();
    rig.controller.running();
    assert_eq!(resident_of(&other), BLOCK, "of the block that is plugged");
}
