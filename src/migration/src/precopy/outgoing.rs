//! The source.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::convergence::{AtMaxRounds, Due, Switchover, Throttle};
use super::elastic::Elastic;
use super::outcome::{GuestAfter, OutgoingError};
use super::parameters::Parameters;
use super::return_path::{ReturnPath, refuse};
use super::{Guest, InUse, PING_LOADED, capabilities, handlers};
use crate::bandwidth::Bandwidth;
use crate::channel::{BufferSink, Channel, Sink};
use crate::devices::{DevicePhase, Devices};
use crate::error::MigrationError;
use crate::framing::{Framing, write};
use crate::handler::{PostcopySave, SaveHandler};
use crate::postcopy::{
    AnswerRequests, Asked, Channels, OutgoingPages, PING_PACKAGE_LOADED, PostcopyOutgoing,
    SwitchWhen, package_len,
};
use crate::progress::{Counters, Progress, Status};
use crate::stream::{
    AdvisedSizes, Command, DISCARD_RANGES_MAX, PING_BLOCK_STATE, PING_DISCARDED, PING_REASON,
    SectionKind, TARGET_PAGE_SIZE, put_command, put_description, put_eof,
};

/// A migration to another host. Each is used once; after a failure another may be tried.
pub struct Outgoing<'a> {
    /// What it may cost.
    pub parameters: Parameters,
    /// The guest.
    pub guest: &'a dyn Guest,
    /// Iterative handlers, RAM among them, in the order of their sections.
    pub handlers: Vec<Box<dyn SaveHandler + 'a>>,
    /// Everything else.
    pub devices: &'a mut dyn Devices,
    /// Postcopy, if it may come to that.
    pub postcopy: Option<PostcopyOutgoing<'a>>,
    /// What can be seen of it, and how it is cancelled.
    pub progress: Arc<Progress>,
}

/// What comes after precopy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The rest fits the downtime.
    Complete,
    /// The guest goes first.
    Postcopy,
}

/// Where the guest is, while things can still go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// It runs here.
    Running,
    /// It is stopped here.
    Stopped,
    /// It runs on the destination, and cannot come back.
    Gone,
}

impl Outgoing<'_> {
    /// Migrates the guest over a connected channel. When this returns `Ok`, the destination has it,
    /// or may have it of a stream that goes [one way](Parameters::one_way): it must not run here
    /// again. Otherwise the error says where it is, and as long as it is here, another migration may
    /// be tried. In any case block state is no longer frozen.
    ///
    /// # Errors
    ///
    /// Why it did not come about, and where the guest is.
    pub fn run(mut self, channel: Channel) -> Result<(), OutgoingError> {
        self.progress.set_status(Status::Setup);
        let mut owner = Owner::Running;
        let result = self.migrate(channel, &mut owner);
        for handler in &mut self.handlers {
            handler.cleanup();
        }
        self.guest.throttle(0);
        let result = result.map_err(|error| self.give_back(owner, error));
        for handler in &mut self.handlers {
            handler.thaw();
        }
        match &result {
            Ok(()) => self.progress.set_status(Status::Completed),
            Err(failed) => {
                let cancelled = matches!(failed.error, MigrationError::Cancelled)
                    && failed.guest == GuestAfter::RunsHere;
                let status = if cancelled { Status::Cancelled } else { Status::Failed };
                self.progress.fail_as(status, failed);
            }
        }
        result
    }

    /// Lets the guest run here again, if it is still here.
    fn give_back(&self, owner: Owner, error: MigrationError) -> OutgoingError {
        match owner {
            Owner::Gone => return OutgoingError { error, guest: GuestAfter::Gone },
            Owner::Running => {}
            Owner::Stopped => {
                if let Err(reason) = self.guest.run() {
                    tracing::error!(%error, %reason, "migration failed, and the guest stays stopped");
                    let error = MigrationError::Vmm { what: "let the guest continue", reason };
                    return OutgoingError { error, guest: GuestAfter::StoppedHere };
                }
            }
        }
        // Whatever broke then broke because of that.
        let cancelled = self.progress.is_cancelled();
        let error = if cancelled { MigrationError::Cancelled } else { error };
        OutgoingError { error, guest: GuestAfter::RunsHere }
    }

    fn migrate(&mut self, mut channel: Channel, owner: &mut Owner) -> Result<(), MigrationError> {
        handlers::check(&self.handlers)?;
        let urgent = self.postcopy.as_ref().and_then(|postcopy| postcopy.urgent.as_ref());
        let pages = self.handlers.iter().flat_map(|handler| handler.encrypted_channels());
        let channels = InUse { main: &channel, urgent, pages: pages.collect() };
        capabilities::check(&self.parameters, self.postcopy.is_some(), &channels)?;
        self.progress.steering.begin(&self.parameters);
        for handler in &mut self.handlers {
            handler.freeze()?;
        }
        let out = &mut channel;
        let mut framing = Framing::begin(out, &self.parameters.configuration)?;
        let mut bytes = Vec::new();
        let mut elastic = Elastic::No;
        if !self.parameters.one_way {
            put_command(&mut bytes, &Command::OpenReturnPath);
            put_command(&mut bytes, &Command::Ping(1));
            put_command(&mut bytes, &Command::Ping(PING_REASON));
            elastic = Elastic::ask(&self.handlers, self.parameters.block_state_timeout);
            if elastic != Elastic::No {
                put_command(&mut bytes, &Command::Ping(PING_BLOCK_STATE));
            }
        }
        if self.postcopy.is_some() {
            put_command(&mut bytes, &Command::PostcopyAdvise(Some(self.page_sizes())));
            put_command(&mut bytes, &Command::Ping(PING_DISCARDED));
        }
        write(out, &bytes)?;
        let back = if self.parameters.one_way {
            None
        } else {
            Some(ReturnPath::listen(out, &self.progress)?)
        };
        self.begin(out, &mut framing).map_err(|error| reason_of(back.as_ref(), error))?;
        self.progress.set_status(Status::Active);
        let next = self
            .iterate(out, back.as_ref(), &framing, &mut elastic)
            .map_err(|error| reason_of(back.as_ref(), error))?;
        // From here on the guest stands still.
        let pauses = self.parameters.pause_before_switchover;
        if !pauses {
            self.progress.set_status(Status::Device);
        }
        self.progress.guest_stopped();
        self.guest
            .stop()
            .map_err(|reason| MigrationError::Vmm { what: "stop the guest", reason })?;
        *owner = Owner::Stopped;
        if pauses {
            self.wait_to_continue(back.as_ref())?;
        }
        let after = channel.uncancellable();
        channel.set_write_patience(self.parameters.switchover_timeout);
        match next {
            Next::Complete => self
                .complete(&mut channel, back.as_ref(), framing)
                .map_err(|error| reason_of(back.as_ref(), error)),
            Next::Postcopy => match back {
                Some(back) => self.postcopy(channel, after, back, framing, owner),
                None => Err(capabilities::no_way_back()),
            },
        }
    }

    /// Waits until the switchover is to go on. A destination that fails meanwhile is noticed.
    fn wait_to_continue(&self, back: Option<&ReturnPath>) -> Result<(), MigrationError> {
        const MOMENT: Duration = Duration::from_millis(20);
        self.progress.set_status(Status::PreSwitchover);
        while !self.progress.steering.wait_to_continue(MOMENT) {
            if self.progress.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            if let Some(back) = back {
                back.check()?;
            }
        }
        self.progress.set_status(Status::Device);
        Ok(())
    }

    /// Sends what comes before pages.
    fn begin(&mut self, out: &mut Channel, framing: &mut Framing) -> Result<(), MigrationError> {
        for section in self.devices.save(DevicePhase::Early)? {
            framing.full(out, section)?;
        }
        self.handlers.iter_mut().try_for_each(|handler| framing.start(out, &mut **handler))
    }

    /// Sends the rest while the guest stands still, and hands it over.
    fn complete(
        &mut self,
        out: &mut Channel,
        back: Option<&ReturnPath>,
        mut framing: Framing,
    ) -> Result<(), MigrationError> {
        let mut bytes = Vec::new();
        put_command(&mut bytes, &Command::SwitchoverStart);
        write(out, &bytes)?;
        for (index, handler) in self.handlers.iter_mut().enumerate() {
            framing.continued(out, index, SectionKind::End, |out| handler.complete(out))?;
        }
        for section in self.devices.save(DevicePhase::Late)? {
            framing.full(out, section)?;
        }
        if let Some(back) = back {
            let mut bytes = Vec::new();
            put_command(&mut bytes, &Command::Ping(PING_LOADED));
            write(out, &bytes)?;
            let patience = self.parameters.switchover_timeout;
            back.wait_for_pong(PING_LOADED, patience, &self.progress, &mut refuse)?;
        }
        self.check_frozen()?;
        // The verdict: the destination has everything. With what follows it gets the guest, and
        // it can no longer be called back.
        let mut bytes = Vec::new();
        put_eof(&mut bytes);
        put_description(&mut bytes, &framing.description());
        let mut last = out.uncancellable();
        let told = write(&mut last, &bytes);
        match (told, back) {
            (told, None) => told?,
            (Ok(()), Some(back)) => back.wait_for_shut(self.parameters.switchover_timeout)?,
            (Err(error), Some(back)) if last.written() != 0 => {
                // It may have the end of the stream, without all of the description, and take the guest.
                back.wait_for_shut(Duration::ZERO).map_err(|_| error)?;
            }
            (Err(error), Some(_)) => return Err(error),
        }
        self.progress.guest_runs_elsewhere();
        Counters::set(&self.progress.counters.transferred, out.written() + bytes.len() as u64);
        Ok(())
    }

    /// Hands the guest over with its devices, and sends the memory after it: on `after`, a handle of the
    /// channel that is as patient as before the guest was stopped.
    fn postcopy(
        &mut self,
        mut channel: Channel,
        after: Channel,
        back: ReturnPath,
        mut framing: Framing,
        owner: &mut Owner,
    ) -> Result<(), MigrationError> {
        let out = &mut channel;
        let index = handlers::end_before_postcopy(&mut self.handlers, out, &framing)?;
        let mut bytes = Vec::new();
        if let Some(memory) = self.handlers[index].postcopy() {
            for (block, ranges) in memory.outstanding()? {
                for ranges in ranges.chunks(DISCARD_RANGES_MAX) {
                    let ranges = ranges.iter().map(|range| (range.start(), range.len()));
                    let (block, ranges) = (block.clone(), ranges.collect());
                    put_command(&mut bytes, &Command::PostcopyRamDiscard { block, ranges });
                }
            }
        }
        // Read whole by the destination before any of it is handled, since loading a device may
        // touch memory, which then has to come behind the package.
        let mut package = BufferSink::default();
        let mut listen = Vec::new();
        put_command(&mut listen, &Command::PostcopyListen);
        write(&mut package, &listen)?;
        for section in self.devices.save(DevicePhase::Late)? {
            framing.full(&mut package, section)?;
        }
        let mut loaded = Vec::new();
        put_command(&mut loaded, &Command::Ping(PING_PACKAGE_LOADED));
        write(&mut package, &loaded)?;
        let len = package_len(package.bytes.len())?;
        put_command(&mut bytes, &Command::Packaged { len });
        bytes.extend_from_slice(&package.bytes);
        write(out, &bytes)?;
        let Some(mut postcopy) = self.postcopy.take() else {
            return Err(MigrationError::Unexpected("postcopy was not provided for".to_owned()));
        };
        let section_id = u32::try_from(index).unwrap_or(u32::MAX);
        let (patience, progress) = (self.parameters.switchover_timeout, Arc::clone(&self.progress));
        let urgent_after = postcopy.urgent.as_ref().map(Channel::uncancellable);
        if let Some(urgent) = &mut postcopy.urgent {
            urgent.set_write_patience(patience);
        }
        let mut asked = Asked::of(self.memory(index)?);
        // From here on a device that is loaded there may need memory.
        let mut answers = AnswerRequests {
            memory: self.memory(index)?,
            section_id,
            main: out,
            urgent: postcopy.urgent.as_mut(),
            asked: &mut asked,
            progress: &progress,
        };
        let answer = &mut |message| answers.answer(message);
        back.wait_for_pong(PING_PACKAGE_LOADED, patience, &progress, answer)?;
        self.check_frozen()?;
        // The verdict. With what follows the destination gets the guest.
        let mut bytes = Vec::new();
        put_command(&mut bytes, &Command::PostcopyRun);
        write(&mut out.uncancellable(), &bytes)?;
        let mut answers = AnswerRequests {
            memory: self.memory(index)?,
            section_id,
            main: out,
            urgent: postcopy.urgent.as_mut(),
            asked: &mut asked,
            progress: &progress,
        };
        back.wait_for_taken(patience, &mut |message| answers.answer(message))?;
        *owner = Owner::Gone;
        self.progress.guest_runs_elsewhere();
        let back = back.end()?;
        let (reconnect, channels) =
            (postcopy.reconnect, Channels { main: after, urgent: urgent_after });
        let max_bandwidth = progress.steering.limits(&self.parameters).max_postcopy_bandwidth;
        let memory = self.memory(index)?;
        let source =
            OutgoingPages { memory, section_id, asked, reconnect, max_bandwidth, progress };
        source.run(channels, back)
    }

    /// The side of a handler that goes on after the guest has left.
    fn memory(&mut self, index: usize) -> Result<&mut dyn PostcopySave, MigrationError> {
        self.handlers[index]
            .postcopy()
            .ok_or_else(|| MigrationError::Unexpected("no handler has memory".to_owned()))
    }

    /// Fails when blocks may have been plugged, and so are missing at the destination.
    fn check_frozen(&self) -> Result<(), MigrationError> {
        self.handlers.iter().try_for_each(|handler| handler.check_frozen())
    }

    fn page_sizes(&mut self) -> AdvisedSizes {
        let handlers = self.handlers.iter_mut().filter_map(|handler| handler.postcopy());
        let page_sizes = handlers.fold(0, |all, memory| all | memory.page_sizes());
        AdvisedSizes { page_sizes, target_page_size: TARGET_PAGE_SIZE }
    }

    /// Whether it is time for postcopy: what cannot be sent after the guest fits the downtime.
    fn switches(&mut self, bandwidth: &Bandwidth) -> bool {
        let bound = handlers::pending_before_postcopy(&mut self.handlers);
        let limit = self.parameters.downtime_limit;
        if bound != 0 && bandwidth.time_for(bound).is_none_or(|time| time > limit) {
            return false;
        }
        let rounds = Counters::get(&self.progress.counters.dirty_sync_count);
        self.postcopy.as_ref().is_some_and(|postcopy| match postcopy.when {
            SwitchWhen::Told => self.progress.wants_postcopy(),
            SwitchWhen::AtOnce => true,
            SwitchWhen::Rounds(limit) => self.progress.wants_postcopy() || rounds > limit,
        })
    }

    /// Slows vCPUs down as far as is told, if it is.
    fn throttle(&self, percent: Option<u8>) {
        if let Some(percent) = percent {
            tracing::info!(percent, "vCPUs are kept from running for a part of the time");
            self.progress.throttled(percent);
            self.guest.throttle(percent);
        }
    }

    /// Sends memory until the rest can be sent within the downtime that is allowed, or the guest
    /// is to go first, and freezes block state then.
    fn iterate(
        &mut self,
        out: &mut Channel,
        back: Option<&ReturnPath>,
        framing: &Framing,
        elastic: &mut Elastic,
    ) -> Result<Next, MigrationError> {
        let next = self.iterate_until_due(out, back, framing, elastic)?;
        // Not with the guest: what stops it waits for a request that is under way.
        let patience = self.parameters.switchover_timeout;
        elastic.freeze(&mut self.handlers, (out, framing), back, &self.progress, patience)?;
        Ok(next)
    }

    fn iterate_until_due(
        &mut self,
        out: &mut Channel,
        back: Option<&ReturnPath>,
        framing: &Framing,
        elastic: &mut Elastic,
    ) -> Result<Next, MigrationError> {
        let mut bandwidth = Bandwidth::new(self.parameters.max_bandwidth, out.written());
        let mut throttle = Throttle::new(self.parameters.throttle);
        let mut handled = 0;
        let max_rounds = match self.postcopy {
            None => self.parameters.max_rounds,
            // When there have been enough is up to postcopy then.
            Some(_) => u64::MAX,
        };
        let mut switchover = Switchover::new(self.parameters.downtime_limit, max_rounds);
        let (mut changes, mut collected) = (0, Instant::now());
        loop {
            if self.progress.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            if self.progress.steering.changes() != changes {
                changes = self.progress.steering.changes();
                let limits = self.progress.steering.limits(&self.parameters);
                self.parameters.downtime_limit = limits.downtime_limit;
                switchover.set_limit(limits.downtime_limit);
                bandwidth.set_limit(limits.max_bandwidth, out.written());
                let percent = throttle.set_parameters(limits.throttle);
                self.throttle(percent);
            }
            if let Some(back) = back {
                elastic.serve(&mut self.handlers, out, framing, back)?;
            }
            if self.switches(&bandwidth) {
                return Ok(Next::Postcopy);
            }
            let counters = &self.progress.counters;
            let estimate: u64 =
                self.handlers.iter().map(|handler| handler.pending_estimate()).sum();
            let dirtied = Counters::get(&counters.dirty_pages_rate) * TARGET_PAGE_SIZE;
            let time_left =
                switchover.time_left(estimate, dirtied, collected.elapsed(), &bandwidth);
            self.progress.expect_end(time_left);
            if switchover.may_be_due(estimate, &bandwidth) {
                let begin = Instant::now();
                let mut exact = 0;
                for handler in &mut self.handlers {
                    exact += handler.pending_exact()?;
                }
                let sync = begin.elapsed();
                collected = begin + sync;
                bandwidth.leave_out(sync);
                let due = switchover.is_due(exact, sync, &bandwidth);
                let expected = switchover.expected(exact, &bandwidth);
                if let Some(time) = expected {
                    self.progress.expect_downtime(time);
                }
                let dirtied = Counters::get(&counters.dirtied) * TARGET_PAGE_SIZE;
                let percent = throttle.after_sync(dirtied, handled);
                self.throttle(percent);
                self.progress.passed(switchover.rounds());
                match (due, self.parameters.at_max_rounds) {
                    (Due::No, _) => {}
                    (Due::Yes, _) | (Due::TooManyRounds, AtMaxRounds::StopAndCopy) => {
                        return Ok(Next::Complete);
                    }
                    (Due::TooManyRounds, AtMaxRounds::Fail) => {
                        return Err(MigrationError::NotConverging {
                            rounds: switchover.rounds(),
                            left: exact,
                            expected: expected.unwrap_or(Duration::MAX),
                            sync,
                            limit: self.parameters.downtime_limit,
                        });
                    }
                }
            }
            let budget = bandwidth.budget(out.written());
            let done = handlers::iterate(&mut self.handlers, out, framing, budget)?;
            bandwidth.handled(done);
            handled += done;
            Counters::set(&counters.transferred, out.written());
            let pause = bandwidth.spent(out.written());
            elastic.pause(pause, &mut self.handlers, (out, framing), back, &self.progress)?;
        }
    }
}

/// Why `error` came about, if the destination said so.
fn reason_of(back: Option<&ReturnPath>, error: MigrationError) -> MigrationError {
    match back {
        Some(back) => back.reason_of(error),
        None => error,
    }
}
