package machine

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Machine is a machine as the host sees it.
type Machine struct {
	Name string
	// Folder is where it keeps what it has.
	Folder string
}

// Boot starts the machine's first process, and returns when it can be talked to.
func (m Machine) Boot(program string, description Description) error {
	encoded, err := json.MarshalIndent(description, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(m.Folder, descriptionFile), encoded, 0o644); err != nil {
		return err
	}
	// One that was killed leaves its socket.
	if err := os.RemoveAll(filepath.Join(m.Folder, socketFile)); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(m.Folder, logFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	first := exec.Command(program, m.Name)
	first.Dir = m.Folder
	first.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	first.Stdout, first.Stderr = log, log
	first.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS |
			syscall.CLONE_NEWIPC,
	}
	if err := first.Start(); err != nil {
		return fmt.Errorf("%s: %w", m.Name, err)
	}
	pid := first.Process.Pid
	ended := make(chan error, 1)
	go func() { ended <- first.Wait() }()
	// With its start time, since a number may come again.
	identity := fmt.Sprintf("%d %s", pid, startTime(pid))
	if err := os.WriteFile(filepath.Join(m.Folder, pidFile), []byte(identity), 0o644); err != nil {
		return err
	}
	for {
		if _, err := m.Services(); err == nil {
			return nil
		}
		select {
		case err := <-ended:
			return fmt.Errorf("%s ended while it started (%v): see %s", m.Name, err, filepath.Join(m.Folder, logFile))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Pid is the first process's, on the host, or 0 if the machine is off.
func (m Machine) Pid() int {
	identity, err := os.ReadFile(filepath.Join(m.Folder, pidFile))
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(identity))
	if len(fields) != 2 {
		return 0
	}
	pid, err := strconv.Atoi(fields[0])
	if err != nil || startTime(pid) != fields[1] {
		return 0
	}
	return pid
}

// Kill pulls the plug.
func (m Machine) Kill() error {
	pid := m.Pid()
	if pid == 0 {
		return nil
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
		return err
	}
	// It is gone when the kernel has ended all processes in it.
	for m.Pid() != 0 {
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

// Services says how the services are.
func (m Machine) Services() ([]State, error) { return m.ask(Request{}) }

// Start starts a service.
func (m Machine) Start(service Service) error {
	_, err := m.ask(Request{Start: &service})
	return err
}

// KillService ends a service at once, and for good.
func (m Machine) KillService(name string) error {
	_, err := m.ask(Request{Kill: name})
	return err
}

// Run runs a program inside the machine and returns what it printed.
func (m Machine) Run(input *os.File, program string, args ...string) (string, error) {
	pid := m.Pid()
	if pid == 0 {
		return "", fmt.Errorf("%s is off", m.Name)
	}
	enter := []string{"--target", strconv.Itoa(pid), "--net", "--mount", "--pid", "--uts", "--ipc", program}
	command := exec.Command("nsenter", append(enter, args...)...)
	command.Stdin = input
	output, err := command.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %s %s: %w\n%s", m.Name, program, strings.Join(args, " "), err, output)
	}
	return string(output), nil
}

func (m Machine) ask(request Request) ([]State, error) {
	// A socket's path may have 107 bytes only, and the repository may lie deep: so by the open folder.
	folder, err := os.Open(m.Folder)
	if err != nil {
		return nil, err
	}
	defer folder.Close()
	connection, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/%s", folder.Fd(), socketFile))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.Name, err)
	}
	defer connection.Close()
	_ = connection.SetDeadline(time.Now().Add(20 * time.Second))
	if err := json.NewEncoder(connection).Encode(request); err != nil {
		return nil, fmt.Errorf("%s: %w", m.Name, err)
	}
	var reply Reply
	if err := json.NewDecoder(connection).Decode(&reply); err != nil {
		return nil, fmt.Errorf("%s: %w", m.Name, err)
	}
	if reply.Error != "" {
		return nil, fmt.Errorf("%s: %s", m.Name, reply.Error)
	}
	return reply.Services, nil
}

// startTime is when a process started, in the kernel's ticks; empty if there is none, or a dead one that nobody has waited for.
func startTime(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The second field is the name, in brackets, and may hold anything.
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" {
		return ""
	}
	return fields[19]
}
