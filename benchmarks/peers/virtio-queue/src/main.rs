//! The workloads of `benchmarks/queue.py` on rust-vmm's virtio-queue: `virtio-queue-peer WORKLOAD`
//! prints the nanoseconds of one turn (of one request for `cycle-N`), the median of many.

use std::hint::black_box;
use std::time::Instant;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const SIZE: u16 = 256;
const COUNT: u16 = 128;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x3000;
const USED: u64 = 0x4000;
const TABLES: u64 = 0x10000;
const DATA: u64 = 0x40000;
const TURNS: usize = 3000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn descriptor(memory: &GuestMemoryMmap, at: u64, address: u64, length: u32, flags: u16, next: u16) {
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(length, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}

fn offer(memory: &GuestMemoryMmap, heads: &[u16]) {
    for slot in 0..SIZE {
        let head = heads[slot as usize % heads.len()];
        memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * slot as u64)).unwrap();
    }
    memory.write_obj(heads.len() as u16, GuestAddress(AVAILABLE + 2)).unwrap();
}

fn prepare(memory: &GuestMemoryMmap, workload: &str) {
    let all: Vec<u16> = (0..COUNT).collect();
    match workload {
        "single" => {
            for index in 0..COUNT {
                let flags = if index + 1 < COUNT { NEXT } else { 0 };
                let at = DESCRIPTORS + 16 * index as u64;
                descriptor(memory, at, DATA + 64 * index as u64, 64, flags, index + 1);
            }
            offer(memory, &[0]);
        }
        "indirect-single" => {
            descriptor(memory, DESCRIPTORS, TABLES, 16 * COUNT as u32, INDIRECT, 0);
            for index in 0..COUNT {
                let flags = if index + 1 < COUNT { NEXT } else { 0 };
                let at = TABLES + 16 * index as u64;
                descriptor(memory, at, DATA + 64 * index as u64, 64, flags, index + 1);
            }
            offer(memory, &[0]);
        }
        "indirect-multiple" => {
            for index in 0..COUNT {
                let table = TABLES + 16 * index as u64;
                descriptor(memory, DESCRIPTORS + 16 * index as u64, table, 16, INDIRECT, 0);
                descriptor(memory, table, DATA + 64 * index as u64, 64, 0, 0);
            }
            offer(memory, &all);
        }
        "cycle" => {
            // A header to read and a byte to write, as a block request without data has.
            for index in 0..COUNT {
                let at = DESCRIPTORS + 32 * index as u64;
                descriptor(memory, at, DATA + 64 * index as u64, 16, NEXT, 2 * index + 1);
                descriptor(memory, at + 16, DATA + 64 * index as u64 + 32, 1, WRITE, 0);
            }
            offer(memory, &all.iter().map(|index| 2 * index).collect::<Vec<_>>());
        }
        _ => {
            for index in 0..COUNT {
                let at = DESCRIPTORS + 16 * index as u64;
                descriptor(memory, at, DATA + 64 * index as u64, 64, 0, 0);
            }
            offer(memory, &all);
        }
    }
}

fn cycle(memory: &GuestMemoryMmap, queue: &mut Queue, batch: u16) {
    for _ in 0..COUNT / batch {
        for _ in 0..batch {
            let mut chain = queue.pop_descriptor_chain(memory).unwrap();
            let head = chain.head_index();
            let header = chain.next().unwrap();
            let status = chain.next().unwrap();
            let request: [u8; 16] = memory.read_obj(header.addr()).unwrap();
            black_box((request, status.addr()));
            queue.add_used(memory, head, 1).unwrap();
        }
        black_box(queue.needs_notification(memory).unwrap());
    }
}

fn main() {
    let workload = std::env::args().nth(1).expect("a workload");
    let (kind, batch) = match workload.strip_prefix("cycle-") {
        Some(number) => ("cycle", number.parse().expect("a number")),
        None => (workload.as_str(), 0u16),
    };
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    prepare(&memory, kind);
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
    queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_event_idx(true);
    queue.set_ready(true);
    let mut times = Vec::with_capacity(TURNS);
    for _ in 0..TURNS {
        queue.set_next_avail(0);
        queue.set_next_used(0);
        let start = Instant::now();
        match kind {
            "cycle" => cycle(&memory, &mut queue, batch),
            "add-used" => {
                for head in 0..COUNT {
                    queue.add_used(&memory, head, 64).unwrap();
                }
            }
            _ => {
                for chain in queue.iter(&memory).unwrap() {
                    for descriptor in chain {
                        black_box((descriptor.addr(), descriptor.len(), descriptor.flags()));
                    }
                }
            }
        }
        times.push(start.elapsed().as_nanos() as f64);
    }
    times.sort_by(f64::total_cmp);
    let each = if kind == "cycle" { COUNT as f64 } else { 1.0 };
    println!("{}", times[TURNS / 2] / each);
}
