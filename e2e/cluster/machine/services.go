package machine

import (
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// What ended by itself is started again after this pause.
const restartPause = time.Second

// Services are the processes that a machine's first process starts, and starts again.
type Services struct {
	logFolder string

	mutex   sync.Mutex
	running []*running
}

type running struct {
	service  Service
	wanted   bool
	pid      int // 0 while it doesn't run
	restarts int
}

// NewServices makes an empty set, which logs into a file for each service.
func NewServices(logFolder string) *Services { return &Services{logFolder: logFolder} }

// Start starts a service, unless it runs; another one of the same name is forgotten.
func (s *Services) Start(service Service) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	entry := s.find(service.Name)
	if entry == nil {
		entry = &running{}
		s.running = append(s.running, entry)
	}
	entry.service, entry.wanted = service, true
	if entry.pid != 0 {
		return nil
	}
	return s.launch(entry)
}

// Kill ends a service, and returns when it has ended.
func (s *Services) Kill(name string) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	entry := s.find(name)
	if entry == nil {
		return fmt.Errorf("no such service: %s", name)
	}
	entry.wanted = false
	for entry.pid != 0 {
		if err := syscall.Kill(entry.pid, syscall.SIGKILL); err != nil {
			return err
		}
		s.mutex.Unlock()
		time.Sleep(10 * time.Millisecond)
		s.mutex.Lock()
	}
	return nil
}

// States says how the services are.
func (s *Services) States() []State {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	states := make([]State, 0, len(s.running))
	for _, entry := range s.running {
		states = append(states, State{Name: entry.service.Name, Pid: entry.pid, Restarts: entry.restarts, Wanted: entry.wanted})
	}
	return states
}

// Reap waits for every child that ends: services, and whatever lost its own parent. It must be told of each SIGCHLD.
func (s *Services) Reap(ended <-chan os.Signal) {
	for range ended {
		for {
			var status syscall.WaitStatus
			// With the lock, so that a service that ends at once is known by its number when it is waited for.
			s.mutex.Lock()
			pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
			if err == nil && pid > 0 {
				s.ended(pid, status)
			}
			s.mutex.Unlock()
			if err == syscall.EINTR {
				continue
			}
			if err != nil || pid <= 0 {
				break
			}
		}
	}
}

func (s *Services) ended(pid int, status syscall.WaitStatus) {
	for _, entry := range s.running {
		if entry.pid != pid {
			continue
		}
		entry.pid = 0
		fmt.Printf("%s %s ended: exit status %d, signal %d\n",
			time.Now().Format(time.RFC3339), entry.service.Name, status.ExitStatus(), status.Signal())
		if entry.wanted {
			entry.restarts++
			time.AfterFunc(restartPause, func() { s.again(entry) })
		}
	}
}

func (s *Services) again(entry *running) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if !entry.wanted || entry.pid != 0 {
		return
	}
	if err := s.launch(entry); err != nil {
		fmt.Printf("%s %s: %v\n", time.Now().Format(time.RFC3339), entry.service.Name, err)
		time.AfterFunc(restartPause, func() { s.again(entry) })
	}
}

// launch uses the bare system call: package os would wait for its children itself, and contend with Reap.
func (s *Services) launch(entry *running) error {
	path, err := exec.LookPath(entry.service.Args[0])
	if err != nil {
		return err
	}
	log, err := os.OpenFile(s.logFolder+"/"+entry.service.Name+".log", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	nothing, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer nothing.Close()
	entry.pid, err = syscall.ForkExec(path, entry.service.Args, &syscall.ProcAttr{
		Dir:   "/",
		Env:   os.Environ(),
		Files: []uintptr{nothing.Fd(), log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		entry.pid = 0
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func (s *Services) find(name string) *running {
	for _, entry := range s.running {
		if entry.service.Name == name {
			return entry
		}
	}
	return nil
}
