package cluster

import (
	"fmt"
	"sync"
	"time"
)

// eventually tries until it succeeds or the limit has passed, and then says what stood in the way.
func eventually(limit time.Duration, try func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := try()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("not in %s: %w", limit, err)
		}
		time.Sleep(lookPause)
	}
}

// each calls the function for all numbers at a time.
func each(numbers []int, do func(int) error) []error {
	failures := make([]error, len(numbers))
	var all sync.WaitGroup
	for i, number := range numbers {
		all.Add(1)
		go func() {
			defer all.Done()
			failures[i] = do(number)
		}()
	}
	all.Wait()
	return failures
}
